// The key lists alone: what the planted races are compiled into.
#include "dropkey_attention_keys.cuh"
#include "harness.h"

using namespace lorasp::cuda;

extern "C" const char* emulated_keys(int64_t rows, int64_t Sk, const int64_t* seed, uint32_t threshold, int* index,
                                     int* rank) {
  return emulated([&] {
    provide(seed, 8, false);
    provide(index, rows * Sk * 4, true);
    provide(rank, rows * (Sk + 1) * 4, true);
    dropkey_attention_keys({4, nullptr}, rows, {Sk, {0, lorasp::kPurposeDropKey, 0, threshold}, seed, index, rank});
  });
}
