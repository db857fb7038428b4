// One instance of the projection, alone: what the planted faults are compiled into.
#include "harness.h"
#include "lora_linear_project.cuh"

using namespace lorasp::cuda;

// h (M, R) = p (M, C) q (R, C)^T in bf16, rows of p and q contiguous at multiples of 16 bytes.
extern "C" const char* planted_project(const bf16* p, const bf16* q, bf16* h, int64_t M, int64_t C, int64_t R) {
  return emulated([&] {
    using Tiles = ProjectTiles<bf16, 16, false>;
    provide(p, M * C * 2, false);
    provide(q, R * C * 2, false);
    provide(h, M * R * 2, true);
    ProjectArgs<bf16> args{};
    args.p = {p, M, C, C, true}, args.count = 1, args.rank_first = true;
    args.members[0] = {{q, R, C, C, true}, R, 1.0f, 0, h, R, nullptr};
    args.part = ceil_div(C, kBlockC) * kBlockC, args.selected = C;
    launch(lora_linear_project_kernel<bf16, 16, false>, {ceil_div(M, Tiles::kBlockM)}, kThreads, Tiles::kSharedBytes,
           nullptr, args);
  });
}
