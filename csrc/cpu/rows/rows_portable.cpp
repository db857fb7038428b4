#include <cstring>

#include "rows.h"

#define LORASP_ISA portable
#include "../common/simd_portable.h"

#include "../common/simd_exp.h"

#include "simd_softmax.h"

#include "rows_impl.h"
