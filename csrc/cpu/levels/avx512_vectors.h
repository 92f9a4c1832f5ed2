/* SPDX-License-Identifier: MIT */
/* What real.h takes instructions for, at all levels with AVX-512. */
#ifndef HEX_AVX512_VECTORS_H
#define HEX_AVX512_VECTORS_H

#include <immintrin.h> /* its functions have targets of their own for clang, that of here for gcc */

#define LEVEL_HAS_MASK_BITS
#define MASK_BITS_F32(m) _mm512_movepi32_mask((__m512i)(m))
#define MASK_BITS_F64(m) _mm512_movepi64_mask((__m512i)(m))

#define LEVEL_HAS_LARGER
#define LARGER_F32(x, y) _mm512_max_ps((__m512)(x), (__m512)(y))
#define LARGER_F64(x, y) _mm512_max_pd((__m512d)(x), (__m512d)(y))
#define SMALLER_F32(x, y) _mm512_min_ps((__m512)(x), (__m512)(y))
#define SMALLER_F64(x, y) _mm512_min_pd((__m512d)(x), (__m512d)(y))

#define LEVEL_HAS_PACK
#define PACK_F32(x, bits) _mm512_maskz_compress_ps((__mmask16)(bits), (__m512)(x))
#define PACK_F64(x, bits) _mm512_maskz_compress_pd((__mmask8)(bits), (__m512d)(x))

#endif
