// One instance of the projection, alone: what the planted faults are compiled into.
#include "harness.h"
#include "lora_linear_project.cuh"

using namespace lorasp::cuda;

// h (M, R) = p (M, C) q (R, C)^T in bf16 for two members with the same q, and columns (M, count) = the columns of p
// that have a position. Rows of p and q contiguous at multiples of 16 bytes.
extern "C" const char* planted_project(const bf16* p, const bf16* q, bf16* h, bf16* other_h, const int* position,
                                       bf16* columns, int64_t M, int64_t C, int64_t R, int64_t count) {
  return emulated([&] {
    using Tiles = ProjectTiles<bf16, 16, false>;
    provide(p, M * C * 2, false);
    provide(q, R * C * 2, false);
    provide(position, C * 4, false);
    provide(h, M * R * 2, true);
    provide(other_h, M * R * 2, true);
    provide(columns, M * count * 2, true);
    ProjectArgs<bf16> args{};
    args.p = {p, M, C, C, true}, args.count = 2, args.rank_blocks = 1, args.rank_first = true;
    args.members[0] = {{q, R, C, C, true}, R, 1.0f, 0, h, R, nullptr};
    args.members[1] = {{q, R, C, C, true}, R, 1.0f, 1, other_h, R, nullptr};
    args.part = ceil_div(C, kBlockC) * kBlockC;
    args.position = position, args.selected = count, args.columns = columns;
    launch(lora_linear_project_kernel<bf16, 16, false>, {2 * ceil_div(M, Tiles::kBlockM)}, kThreads,
           Tiles::kSharedBytes, nullptr, args);
  });
}
