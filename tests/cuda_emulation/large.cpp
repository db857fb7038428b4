// The kernels of lora_linear on matrices too large to hold: one row stands for all rows of p and h (stride 0), only the
// last block runs, and what it writes lies where the last rows of the result would.
#include "harness.h"
#include "lora_linear_launch.cuh"

using namespace lorasp::cuda;

// Of the rows from the last multiple of 1024 on, for C <= kBlockC: xa = (keep o p) q, out += keep o (h q),
// parts = (keep o p)^T h.
extern "C" const char* large(const bf16* p, const bf16* h, const bf16* q, bool rank_first, int64_t M, int64_t C,
                             int64_t R, const int64_t* seed, uint32_t threshold, bf16* xa, bf16* out, float* parts) {
  return emulated([&] {
    emulation::GlobalMemory::instance().open();
    emulation::last_block_only() = true;
    const Device device{1, nullptr};
    const Dropout dropout{{0, 0, 0, threshold}, seed};
    const bool aligned = C % 8 == 0;
    const int64_t first = M / 1024 * 1024, part = int64_t{1} << 30;
    const Matrix<const bf16> rows_p{p, M, C, 0, aligned}, rows_h{h, M, R, 0, false};
    const Matrix<const bf16> factor{q, rank_first ? R : C, rank_first ? C : R, rank_first ? C : R,
                                    rank_first && aligned};
    project<bf16>(device, rows_p, {{factor, R, 1.0f, 0, xa - first * R, R}}, rank_first, dropout, {}, nullptr, nullptr);
    accumulate<bf16>(device, {{rows_h, factor, 0}}, rank_first, dropout, nullptr, true,
                     {out - first * C, M, C, C, aligned});
    OuterArgs<bf16> args{};
    args.p = rows_p, args.count = args.rank_blocks = 1, args.members[0] = {rows_h, 0, parts - M / part * R * C};
    args.rank_first = rank_first, args.part = part, args.keep = dropout.keep, args.seed = seed;
    args.mask_columns = args.selected = C;
    launch(lora_linear_outer_kernel<bf16, 16>, {1, ceil_div(M, part)}, kThreads, OuterTiles<bf16, 16>::kSharedBytes,
           nullptr, args);
  });
}

// Sums of so many terms, on so many multiprocessors, that they are split into more parts than a grid's y can count.
// zeros: `columns` of them.
extern "C" const char* long_sums(const bf16* zeros, int64_t columns, int64_t rows) {
  return emulated([&] {
    emulation::GlobalMemory::instance().open();
    emulation::last_block_only() = true;
    const Device device{1 << 20, nullptr};
    bf16 h[8] = {};
    const auto floats = [](int64_t count) { return std::vector<float>(static_cast<size_t>(count)); };
    const Matrix<const bf16> wide{zeros, 1, columns, columns, false}, one{zeros, 1, 1, 1, false};
    const Matrix<const bf16> column{zeros, columns, 1, 1, false};
    const Matrix<const bf16> tall{zeros, rows, 8, 0, true}, tall_h{zeros, rows, 1, 0, false};
    project<bf16>(device, wide, {{wide, 1, 1.0f, 0, h, 1}}, true, {}, {}, nullptr,
                  floats(project_workspace<bf16>(device, 1, columns, {1}, false)).data());
    project_outer<bf16>(device, wide, {column, 1, 1.0f, 0, h, 1}, one, {}, {},
                        floats(project_outer_workspace<bf16>(device, 1, columns, 1)).data());
    outer<bf16>(device, tall, {{tall_h, 0, {h, false}}}, true, {}, nullptr, 0, {},
                floats(outer_workspace<bf16>(device, rows, 8, {1}, false)).data());
  });
}
