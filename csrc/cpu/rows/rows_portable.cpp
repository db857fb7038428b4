#include <cstring>

#include "rows.h"

#define LORASP_ISA portable
#include "simd_portable.h"

#include "simd_exp.h"

#include "simd_softmax.h"

#include "rows_impl.h"
