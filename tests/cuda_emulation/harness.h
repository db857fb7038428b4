// What every emulated function for ctypes does: errors become text, memory is the kernels' only as far as it is given.
#pragma once
#include "primitives.cuh"

// Lets the kernels of this call read (and, once per launch, write) these bytes.
inline void provide(const void* data, int64_t bytes, bool writable) {
  emulation::GlobalMemory::instance().add(data, bytes, writable);
}

// f of a value of the type that library.py's DTYPES numbers.
template <class F>
void with_type(int dtype, F&& f) {
  if (dtype == 0) f(float());
  if (dtype == 1) f(lorasp::cuda::bf16());
  if (dtype == 2) f(lorasp::cuda::f16());
}

// nullptr, or what went wrong.
inline const char* emulated(const std::function<void()>& call) {
  static std::string message;
  emulation::GlobalMemory::instance().forget();
  // Of all libraries in the process: the loader gives them one copy of an inline function's statics.
  const struct WholeGridsAgain {
    ~WholeGridsAgain() { emulation::last_block_only() = false; }
  } whole_grids_again;
  try {
    call();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

extern "C" inline void __attribute__((used)) emulated_set_order(uint64_t seed) { emulation::order_seed() = seed; }
