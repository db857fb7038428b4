// Small kernels that ask the emulator one question each.
#include "harness.h"
#include "tile.cuh"

using namespace lorasp::cuda;

namespace {

struct Data {
  const int* in;
  int* out;
};

template <class Kernel>
const char* one_block(Kernel kernel, const Data& data, int threads, int shared_bytes, int blocks = 1) {
  return emulated([&] {
    if (data.in) provide(data.in, 256, false);
    if (data.out) provide(data.out, 256, true);
    launch<Data>(kernel, {blocks}, threads, shared_bytes, nullptr, data);
  });
}

}  // namespace

extern "C" {

// Two warps turn 64 numbers round through shared memory.
const char* probe_reverse(const int* in, int* out) {
  return one_block(
      [](Data data) {
        const Shared<int> room = shared_memory<int>(0);
        room[threadIdx.x] = load_global(data.in + threadIdx.x);
        sync_threads();
        store_global(data.out + threadIdx.x, int(room[63 - threadIdx.x]));
      },
      {in, out}, 64, 256);
}
const char* probe_missing_barrier(const int* in, int* out) {
  return one_block(
      [](Data data) {
        const Shared<int> room = shared_memory<int>(0);
        room[threadIdx.x] = load_global(data.in + threadIdx.x);
        store_global(data.out + threadIdx.x, int(room[63 - threadIdx.x]));
      },
      {in, out}, 64, 256);
}
const char* probe_missing_barrier_after_read(const int* in, int* out) {
  return one_block(
      [](Data data) {
        const Shared<int> room = shared_memory<int>(0);
        room[threadIdx.x] = load_global(data.in + threadIdx.x);
        sync_threads();
        const int v = room[63 - threadIdx.x];
        room[threadIdx.x] = v;
        store_global(data.out + threadIdx.x, v);
      },
      {in, out}, 64, 256);
}
const char* probe_barrier_some_threads_miss() {
  return one_block(
      [](Data) {
        if (threadIdx.x != 40) sync_threads();
      },
      {}, 64, 0);
}
const char* probe_barriers_at_two_places() {
  return one_block(
      [](Data) {
        if (threadIdx.x < 32)
          sync_threads();
        else
          sync_threads();
      },
      {}, 64, 0);
}
const char* probe_read_before_write() {
  return one_block([](Data) { (void)int(shared_memory<int>(0)[threadIdx.x]); }, {}, 32, 128);
}
const char* probe_shared_out_of_bounds() {
  return one_block([](Data) { shared_memory<int>(0)[threadIdx.x + 1] = 0; }, {}, 32, 128);
}
const char* probe_global_out_of_bounds(const int* in) {
  return one_block([](Data data) { load_global(data.in + 64 + threadIdx.x); }, {in, nullptr}, 32, 0);
}
const char* probe_global_unaligned(const int* in) {
  return one_block([](Data data) { load_global16(data.in + threadIdx.x); }, {in, nullptr}, 32, 0);
}
const char* probe_written_twice(int* out) {
  return one_block([](Data data) { store_global(data.out + threadIdx.x, 1); }, {nullptr, out}, 32, 0, 2);
}
const char* probe_read_of_another_block_s_write(int* out) {
  return one_block(
      [](Data data) {
        if (blockIdx.x == 0)
          store_global(data.out + threadIdx.x, 1);
        else
          load_global(data.out + threadIdx.x);
      },
      {nullptr, out}, 32, 0, 2);
}

// Every lane l receives what lane l - distance of its warp has.
const char* probe_shuffle_up(const int* in, int* out) {
  return one_block(
      [](Data data) {
        const int v = load_global(data.in + threadIdx.x);
        store_global(data.out + threadIdx.x, shuffle_up(v, 4));
      },
      {in, out}, 64, 0);
}
// Lane l receives what the lane whose number differs in bits 0 and 2 has.
const char* probe_shuffle_xor(const int* in, int* out) {
  return one_block(
      [](Data data) {
        const float v = static_cast<float>(load_global(data.in + threadIdx.x));
        store_global(data.out + threadIdx.x, static_cast<int>(shuffle_xor(v, 5)));
      },
      {in, out}, 64, 0);
}
const char* probe_shuffle_a_lane_misses(const int* in) {
  return one_block(
      [](Data) {
        if (threadIdx.x % 32 != 7) shuffle_up(1, 1);
      },
      {in, nullptr}, 64, 0);
}

// 16 bytes per thread, copied asynchronously, read by the neighbour.
const char* probe_copy(const int* in, int* out) {
  return one_block(
      [](Data data) {
        if (threadIdx.x < 16)
          copy_async16(shared_memory<int>(16 * static_cast<int>(threadIdx.x)), data.in + 4 * threadIdx.x, 12);
        commit_copies();
        wait_for_copies<0>();
        sync_threads();
        store_global(data.out + threadIdx.x, int(shared_memory<int>(0)[63 - threadIdx.x]));
      },
      {in, out}, 64, 256);
}
const char* probe_copy_without_wait(const int* in, int* out) {
  return one_block(
      [](Data data) {
        if (threadIdx.x < 16)
          copy_async16(shared_memory<int>(16 * static_cast<int>(threadIdx.x)), data.in + 4 * threadIdx.x, 16);
        commit_copies();
        wait_for_copies<1>();
        sync_threads();
        store_global(data.out + threadIdx.x, int(shared_memory<int>(0)[threadIdx.x]));
      },
      {in, out}, 64, 256);
}
const char* probe_copy_without_barrier(const int* in, int* out) {
  return one_block(
      [](Data data) {
        if (threadIdx.x < 16)
          copy_async16(shared_memory<int>(16 * static_cast<int>(threadIdx.x)), data.in + 4 * threadIdx.x, 16);
        commit_copies();
        wait_for_copies<0>();
        store_global(data.out + threadIdx.x, int(shared_memory<int>(0)[63 - threadIdx.x]));
      },
      {in, out}, 64, 256);
}

// acc (32, 4) += one mma.m16n8k16 of the fragments a (32, 4) and b (32, 2), a row per lane.
const char* probe_multiply(int dtype, const uint32_t* a, const uint32_t* b, float* acc) {
  struct Fragments {
    int dtype;
    const uint32_t *a, *b;
    float* acc;
  };
  return emulated([&] {
    provide(a, 512, false), provide(b, 256, false), provide(acc, 512, true);
    launch<Fragments>(
        [](Fragments f) {
          uint32_t a[4], b[2];
          float acc[4] = {};
          for (int i = 0; i < 4; ++i) a[i] = load_global(f.a + threadIdx.x * 4 + i);
          for (int i = 0; i < 2; ++i) b[i] = load_global(f.b + threadIdx.x * 2 + i);
          f.dtype == 1 ? multiply_matrices<bf16>(acc, a, b) : multiply_matrices<f16>(acc, a, b);
          for (int i = 0; i < 4; ++i) store_global(f.acc + threadIdx.x * 4 + i, acc[i]);
        },
        {}, 32, 0, nullptr, {dtype, a, b, acc});
  });
}

// Matrix i (0 to 3) of four 8 x 8 matrices (rows of 16 bytes, one after the other) as load_matrices hands it out:
// to (32, 4), a row per lane.
const char* probe_load_matrices(const uint16_t* from, uint32_t* to, bool transposed) {
  struct Matrices {
    const uint16_t* from;
    uint32_t* to;
    bool transposed;
  };
  return emulated([&] {
    provide(from, 512, false), provide(to, 512, true);
    launch<Matrices>(
        [](Matrices m) {
          const Shared<f16> room = shared_memory<f16>(0), row = room + static_cast<int>(threadIdx.x) * 8;
          for (int i = 0; i < 8; ++i) row[i] = f16{load_global(m.from + threadIdx.x * 8 + i)};
          sync_threads();
          uint32_t to[4];
          m.transposed ? load_matrices<true>(to, row) : load_matrices<false>(to, row);
          for (int i = 0; i < 4; ++i) store_global(m.to + threadIdx.x * 4 + i, to[i]);
        },
        {}, 32, 512, nullptr, {from, to, transposed});
  });
}

// A kernel that does nothing, by the last block of such a grid.
const char* probe_launch(int64_t x, int64_t y, int64_t z, int threads, int shared_bytes) {
  return emulated([&] {
    emulation::last_block_only() = true;
    launch<Data>([](Data) {}, {x, y, z}, threads, shared_bytes, nullptr, {});
  });
}

// out (count,) = float(type(in)): both conversions of a type.
const char* probe_round(int dtype, const float* in, float* out, int64_t count) {
  return emulated([&] {
    for (int64_t i = 0; i < count; ++i)
      out[i] = dtype == 1 ? to_float(from_float<bf16>(in[i])) : to_float(from_float<f16>(in[i]));
  });
}
}
