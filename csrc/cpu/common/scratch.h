// Memory for one call, reused across calls: every thread keeps one arena that grows to the largest need seen.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

namespace lorasp {

// Everything taken from a frame is given back when the frame ends. Frames nest; contents are uninitialised.
class ScratchFrame {
 public:
  ScratchFrame() : used_(arena().used), blocks_(arena().blocks.size()) { ++arena().depth; }
  ScratchFrame(const ScratchFrame&) = delete;
  ScratchFrame& operator=(const ScratchFrame&) = delete;

  ~ScratchFrame() {
    Arena& a = arena();
    a.used = a.blocks.size() == blocks_ ? used_ : 0;
    if (--a.depth == 0) a.settle();
  }

  template <class T>
  T* take(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + kAlign - 1) / kAlign * kAlign;
    void* memory = arena().take(bytes);
    if (poison().load(std::memory_order_relaxed)) std::memset(memory, 0xFF, bytes);  // NaN in every dtype
    return static_cast<T*>(memory);
  }

  // For tests: uninitialised memory that shows.
  static std::atomic<bool>& poison() {
    static std::atomic<bool> flag{false};
    return flag;
  }

 private:
  static constexpr size_t kAlign = 64, kFirstBytes = size_t{1} << 20, kKeepBytes = size_t{64} << 20;

  struct Arena {
    struct Block {
      char* memory;
      size_t size;
    };
    std::vector<Block> blocks;  // more than one only until the outermost frame ends
    size_t used = 0, depth = 0;

    ~Arena() {
      for (const Block& block : blocks) std::free(block.memory);
    }
    void add(size_t size) {
      auto* memory = static_cast<char*>(std::aligned_alloc(kAlign, size));
      if (memory == nullptr) throw std::bad_alloc();
      blocks.push_back({memory, size});
      used = 0;
    }
    void* take(size_t bytes) {
      if (blocks.empty() || blocks.back().size - used < bytes) {
        size_t size = kFirstBytes;
        for (const Block& block : blocks) size += block.size;
        add(size > bytes ? size : bytes);
      }
      used += bytes;
      return blocks.back().memory + used - bytes;
    }
    void settle() {
      size_t total = 0;
      for (const Block& block : blocks) total += block.size;
      if (blocks.size() == 1 && total <= kKeepBytes) return;
      for (const Block& block : blocks) std::free(block.memory);
      blocks.clear();
      used = 0;
      if (total > 0 && total <= kKeepBytes) add(total);
    }
  };

  static Arena& arena() {
    static thread_local Arena instance;
    return instance;
  }

  size_t used_, blocks_;
};

}  // namespace lorasp
