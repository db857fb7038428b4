// Stands in for libcublas and libcublasLt: handles and one heuristic result. Every other function of theirs does
// nothing and reports success; products (gemm, gemv, Matmul) are counted as launches.
#include <cstddef>
#include <cstdint>

namespace {
constexpr int kVersion = 130100;
constexpr int kCudartVersion = 13000;
void* const kHandle = reinterpret_cast<void*>(0x10);

struct HeuristicResult {  // cublasLtMatmulHeuristicResult_t
  uint64_t algorithm[8];
  size_t workspace;
  int status;
  float waves;
  int reserved[4];
};
}  // namespace

extern "C" {
int cublasCreate_v2(void** handle) { return *handle = kHandle, 0; }
int cublasGetMathMode(void*, int* mode) { return *mode = 0, 0; }
int cublasGetPointerMode_v2(void*, int* mode) { return *mode = 0, 0; }
int cublasGetVersion_v2(void*, int* version) { return *version = kVersion, 0; }

int cublasLtCreate(void** handle) { return *handle = kHandle, 0; }
size_t cublasLtGetVersion() { return kVersion; }
size_t cublasLtGetCudartVersion() { return kCudartVersion; }
int cublasLtMatmulDescCreate(void** to, int, int) { return *to = kHandle, 0; }
int cublasLtMatrixLayoutCreate(void** to, int, uint64_t, uint64_t, int64_t) { return *to = kHandle, 0; }
int cublasLtMatmulPreferenceCreate(void** to) { return *to = kHandle, 0; }
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, HeuristicResult* to,
                                   int* count) {
  return *to = {}, *count = 1, 0;
}
}
