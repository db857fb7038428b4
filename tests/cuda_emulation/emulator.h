// Blocks of CUDA threads on one CPU thread. Every CUDA thread is a fiber that runs until it waits: for its block
// (sync_threads) or for its warp (shuffles, matrix products). Whoever the others wait for runs next, in an order the
// test chooses; the same order gives the same run. What hardware leaves undefined is an error here: a barrier that some
// threads miss or reach elsewhere, a warp operation that not all 32 lanes reach together.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "memory.h"

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};
inline Index3 threadIdx, blockIdx;

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;

class Block;

// One operation of a whole warp: run once, when the last of its lanes has arrived, over what each lane brought.
struct WarpOperation {
  const char* name;
  int line;
  void (*run)(void* const (&lanes)[kWarp]);
};

enum class State { kReady, kAtBarrier, kAtWarpOperation, kDone };

struct Thread {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  ucontext_t start;
  jmp_buf resume;
  bool started;
  State state;
  WarpOperation operation;
  void* brought;
  int line;
  CopyQueue copies;
};

class Block {
 public:
  static Block*& current() {
    static Block* block = nullptr;
    return block;
  }

  Block(int threads, int shared_bytes) : threads_(threads), shared(shared_bytes) {
    if (threads % kWarp != 0) throw Error("a block of " + std::to_string(threads) + " threads is no number of warps");
  }

  // Runs `body` as block `index` of a grid, its threads in the order of `order`.
  void run(Index3 index, const std::function<void()>& body, const std::vector<int>& order) {
    current() = this;
    body_ = &body;
    failure_.clear();
    shared.reset();
    for (Thread& t : threads_) t.started = false, t.state = State::kReady, t.copies.clear();
    for (;;) {
      bool ran = false;
      for (int t : order) {
        if (threads_[t].state != State::kReady) continue;
        blockIdx = index;
        threadIdx = {static_cast<unsigned>(t), 0, 0};
        running_ = t;
        in_thread_ = true;
        resume(threads_[t]);
        in_thread_ = false;
        if (!failure_.empty()) throw Error(place(index, t) + failure_);
        ran = true;
      }
      try {
        if (release_warps() || release_block()) continue;
      } catch (const Error& error) {
        throw Error(place(index, running_) + error.what());
      }
      if (!ran) break;
    }
    for (size_t t = 0; t < threads_.size(); ++t)
      if (threads_[t].state != State::kDone) throw Error(place(index, static_cast<int>(t)) + waiting(threads_[t]));
  }

  int thread() const { return running_; }
  CopyQueue& copies() { return threads_[running_].copies; }

  void barrier(int line) {
    threads_[running_].line = line;
    wait(State::kAtBarrier);
  }
  void warp_operation(const WarpOperation& operation, void* brought) {
    Thread& t = threads_[running_];
    t.operation = operation, t.brought = brought, t.line = operation.line;
    wait(State::kAtWarpOperation);
  }
  // Ends the running thread; the launch fails with this message.
  [[noreturn]] void fail(const std::string& message) {
    if (!in_thread_) throw Error(message);
    failure_ = message;
    _longjmp(scheduler_, 1);
  }

 private:
  std::vector<Thread> threads_;
  const std::function<void()>* body_ = nullptr;
  jmp_buf scheduler_;
  int running_ = 0;
  bool in_thread_ = false;
  std::string failure_;

 public:
  SharedMemory shared;

 private:
  static std::string place(Index3 block, int thread) {
    char text[96];
    std::snprintf(text, sizeof text, "block (%u, %u, %u) thread %d: ", block.x, block.y, block.z, thread);
    return text;
  }
  static std::string waiting(const Thread& t) {
    const std::string line = " in line " + std::to_string(t.line);
    if (t.state == State::kAtBarrier) return "waits at the barrier" + line + ", which other threads never reach";
    return std::string("waits for its warp at ") + t.operation.name + line + ", which other lanes never reach";
  }

  // ucontext only begins a fiber: its switches call the kernel, _setjmp's do not.
  void resume(Thread& t) {
    if (_setjmp(scheduler_) != 0) return;
    if (t.started) _longjmp(t.resume, 1);
    t.started = true;
    getcontext(&t.start);
    t.start.uc_stack.ss_sp = t.stack.get();
    t.start.uc_stack.ss_size = kStackBytes;
    t.start.uc_link = nullptr;
    makecontext(&t.start, &Block::enter, 0);
    setcontext(&t.start);
  }
  static void enter() {
    Block& block = *current();
    (*block.body_)();
    block.threads_[block.running_].state = State::kDone;
    _longjmp(block.scheduler_, 1);
  }
  void wait(State state) {
    Thread& t = threads_[running_];
    t.state = state;
    if (_setjmp(t.resume) == 0) _longjmp(scheduler_, 1);
  }

  bool release_warps() {
    bool released = false;
    for (size_t first = 0; first < threads_.size(); first += kWarp) {
      void* brought[kWarp];
      int arrived = 0;
      const WarpOperation operation = threads_[first].operation;
      for (int lane = 0; lane < kWarp; ++lane) {
        const Thread& t = threads_[first + lane];
        brought[lane] = t.brought;
        arrived += t.state == State::kAtWarpOperation && t.operation.run == operation.run && t.line == operation.line;
      }
      if (arrived < kWarp) continue;
      running_ = static_cast<int>(first);
      operation.run(brought);
      for (int lane = 0; lane < kWarp; ++lane) threads_[first + lane].state = State::kReady;
      released = true;
    }
    return released;
  }
  bool release_block() {
    for (const Thread& t : threads_)
      if (t.state != State::kAtBarrier || t.line != threads_[0].line) return false;
    shared.next_interval();
    for (Thread& t : threads_) t.state = State::kReady;
    return true;
  }
};

// The order in which blocks and threads run: 0 ascending, 1 descending, others shuffled by that seed.
inline uint64_t& order_seed() {
  static uint64_t seed = 0;
  return seed;
}
inline std::vector<int> order_of(int count) {
  std::vector<int> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  uint64_t state = order_seed();
  if (state == 1) std::reverse(order.begin(), order.end());
  for (int i = count - 1; state > 1 && i > 0; --i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    std::swap(order[static_cast<size_t>(i)], order[static_cast<size_t>((state >> 33) % static_cast<uint64_t>(i + 1))]);
  }
  return order;
}

// Where a grid is too large to run whole: the last block alone.
inline bool& last_block_only() {
  static bool only = false;
  return only;
}

inline void run_grid(int64_t x, int64_t y, int64_t z, int threads, int shared_bytes,
                     const std::function<void()>& body) {
  GlobalMemory::instance().begin_launch();
  Block block(threads, shared_bytes);
  const std::vector<int> order = order_of(threads);
  const auto run = [&](int64_t b) {
    block.run({static_cast<unsigned>(b % x), static_cast<unsigned>(b / x % y), static_cast<unsigned>(b / x / y)}, body,
              order);
  };
  if (last_block_only()) return run(x * y * z - 1);
  for (int b : order_of(static_cast<int>(x * y * z))) run(b);
}

}  // namespace emulation
