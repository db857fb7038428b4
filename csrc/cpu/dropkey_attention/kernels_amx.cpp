// bf16 only: the other dtypes use the AVX-512 kernels.
#if defined(__x86_64__) && defined(__linux__)
#include "kernels.h"

#define LORASP_ISA amx
#define LORASP_AMX
#include "../common/target_avx512_bf16.h"

#include "../common/simd_avx512.h"

#include "../common/simd_exp.h"
#include "../common/amx_tiles.h"
#include "../common/transpose16.h"
#include "kernels_impl.h"

namespace lorasp::amx {
const AttentionKernels kAttention[1] = {make_attention<PairedTiles>()};
}
#include "../common/target_end.h"
#endif
