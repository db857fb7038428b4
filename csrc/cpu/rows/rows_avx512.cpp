#if defined(__x86_64__)
#include "rows.h"

#include "../common/target_avx512.h"

#include "../common/simd_avx512.h"

#include "../common/simd_exp.h"

#include "simd_softmax.h"

#include "rows_impl.h"

#include "../common/target_end.h"
#endif
