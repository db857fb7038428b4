// The emulated memories, checked access by access. Shared memory: in bounds, written before it is read, no two threads
// on one byte between two barriers unless both read, nothing read while an asynchronous copy is on its way there.
// Global memory: in bounds of what the test passed in, every byte of an output written once per launch.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulation {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] void fail(const std::string& message);
int running_thread();
int64_t running_thread_of_grid();

class SharedMemory {
 public:
  explicit SharedMemory(int bytes) : data_(static_cast<size_t>(bytes)), shadow_(data_.size() / kCell) {}

  void reset() {
    std::fill(data_.begin(), data_.end(), uint8_t{0xFF});  // NaN in every type
    std::fill(shadow_.begin(), shadow_.end(), Cell{});
    interval_ = 1;
  }
  void next_interval() { ++interval_; }

  void read(int at, void* to, int bytes, int thread) {
    check(at, bytes, "reads");
    for (int i = at / kCell; i < (at + bytes) / kCell; ++i) {
      Cell& b = shadow_[static_cast<size_t>(i)];
      if (b.copying) complain(i, "is read while an asynchronous copy is on its way there");
      if (b.write_interval == 0) complain(i, "is read before anything is written there");
      if (b.write_interval == interval_ && b.writer != thread) complain(i, "is read without a barrier after a write");
      b.reader = b.read_interval == interval_ && b.reader != thread ? kSeveral : thread;
      b.read_interval = interval_;
    }
    std::memcpy(to, &data_[static_cast<size_t>(at)], static_cast<size_t>(bytes));
  }
  void write(int at, const void* from, int bytes, int thread) {
    claim(at, bytes, thread);
    std::memcpy(&data_[static_cast<size_t>(at)], from, static_cast<size_t>(bytes));
  }
  // An asynchronous copy may land at any time between the two.
  void begin_copy(int at, int bytes, int thread) {
    claim(at, bytes, thread);
    for (int i = at / kCell; i < (at + bytes) / kCell; ++i) shadow_[static_cast<size_t>(i)].copying = true;
    std::memset(&data_[static_cast<size_t>(at)], 0xFF, static_cast<size_t>(bytes));
  }
  void end_copy(int at, const void* from, int bytes, int thread) {
    for (int i = at / kCell; i < (at + bytes) / kCell; ++i) shadow_[static_cast<size_t>(i)].copying = false;
    write(at, from, bytes, thread);
  }

 private:
  static constexpr int kSeveral = -1;
  static constexpr int kCell = 2;  // bytes of the smallest element that lies in shared memory
  struct Cell {
    int write_interval = 0, read_interval = 0;  // 0: never
    int writer = 0, reader = 0;
    bool copying = false;
  };
  std::vector<uint8_t> data_;
  std::vector<Cell> shadow_;
  int interval_ = 1;

  void check(int at, int bytes, const char* verb) const {
    if (at < 0 || at + bytes > static_cast<int>(data_.size()))
      fail(std::string(verb) + " shared byte " + std::to_string(at) + " of " + std::to_string(data_.size()));
    if (at % bytes != 0 || bytes % kCell != 0)
      fail(std::string(verb) + " shared byte " + std::to_string(at) + " unaligned");
  }
  void claim(int at, int bytes, int thread) {
    check(at, bytes, "writes");
    for (int i = at / kCell; i < (at + bytes) / kCell; ++i) {
      Cell& b = shadow_[static_cast<size_t>(i)];
      if (b.copying) complain(i, "is written while an asynchronous copy is on its way there");
      if (b.write_interval == interval_ && b.writer != thread) complain(i, "is written twice without a barrier");
      if (b.read_interval == interval_ && b.reader != thread) complain(i, "is written without a barrier after a read");
      b.write_interval = interval_, b.writer = thread;
    }
  }
  [[noreturn]] static void complain(int cell, const char* what) {
    fail("shared byte " + std::to_string(cell * kCell) + " " + what);
  }
};

// The 16-byte copies one thread has under way, in groups. They are performed when the thread waits for them, not
// before.
class CopyQueue {
 public:
  struct Copy {
    int to;
    const void* from;
    int bytes;
  };
  void clear() { groups_.assign(1, {}); }
  void add(const Copy& copy) { groups_.back().push_back(copy); }
  void commit() { groups_.emplace_back(); }
  // All committed groups but the newest `pending`, oldest first.
  std::vector<Copy> finish(size_t pending) {
    std::vector<Copy> done;
    for (; groups_.size() - 1 > pending; groups_.erase(groups_.begin()))
      done.insert(done.end(), groups_.front().begin(), groups_.front().end());
    return done;
  }

 private:
  std::vector<std::vector<Copy>> groups_{1};
};

class GlobalMemory {
 public:
  static GlobalMemory& instance() {
    static GlobalMemory memory;
    return memory;
  }
  // Nothing may be touched but what is added.
  void forget() { ranges_.clear(), open_ = false; }
  // Everything may be touched: for whole operators, whose memory is torch's.
  void open() { open_ = true; }
  void add(const void* begin, int64_t bytes, bool writable) {
    Range range{static_cast<const char*>(begin), bytes, {}};
    if (writable) range.writer.assign(static_cast<size_t>(bytes), 0);
    ranges_.push_back(std::move(range));
  }
  void begin_launch() {
    for (Range& r : ranges_) std::fill(r.writer.begin(), r.writer.end(), 0);
  }
  void check_read(const void* p, int bytes, int alignment) {
    if (open_) return;
    const Range& range = find(p, bytes, alignment, "reads");
    if (range.writer.empty()) return;
    for (int64_t i = static_cast<const char*>(p) - range.begin, end = i + bytes; i < end; ++i)
      if (range.writer[i] != 0 && range.writer[i] != running_thread_of_grid() + 1)
        fail("reads global memory that another thread writes in the same launch");
  }
  void check_write(const void* p, int bytes) {
    if (open_) return;
    Range& range = find(p, bytes, bytes, "writes");
    if (range.writer.empty()) fail("writes global memory that is only to be read");
    for (int64_t i = static_cast<const char*>(p) - range.begin, end = i + bytes; i < end; ++i) {
      if (range.writer[i] != 0) fail("writes global memory that was written in the same launch");
      range.writer[i] = running_thread_of_grid() + 1;
    }
  }

 private:
  struct Range {
    const char* begin;
    int64_t bytes;
    std::vector<int64_t> writer;  // 1 + the thread that wrote a byte in this launch; empty: only to be read
  };
  std::vector<Range> ranges_;
  bool open_ = false;

  Range& find(const void* p, int bytes, int alignment, const char* verb) {
    const char* at = static_cast<const char*>(p);
    if (reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(alignment) != 0)
      fail(std::string(verb) + " global memory unaligned");
    for (Range& r : ranges_)
      if (at >= r.begin && at + bytes <= r.begin + r.bytes) return r;
    fail(std::string(verb) + " global memory out of bounds");
  }
};

}  // namespace emulation
