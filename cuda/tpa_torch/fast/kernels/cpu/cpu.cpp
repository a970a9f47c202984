// Products with numbers that are stored in few bits, on a CPU. Compiled by `native.py` with the machine's own compiler.
//
// Of int8, int4 and packed codes PyTorch first makes an array of float32, which costs more than the product; and its
// products with a few queries take two to five times as long as reading the keys, since the libraries behind it copy them
// into another order first. These functions read what is stored as it lies, once. With few queries the memory decides, and
// numbers are made in registers; with many the multiplications do, and a block of keys is made numbers in the nearest
// cache. Letters as everywhere: b batch (or batch times heads), k keys, d head size, x or y queries, s coefficients.

#include "attend.hpp"
#include "banded.hpp"
#include "codes.hpp"
#include "coding.hpp"
#include "decoder.hpp"
#include "layer.hpp"
#include "rotated.hpp"
#include "trellis.hpp"

extern "C" int tpa_has_bf16_dot() {
#if TPA_BF16_DOT
    return 1;
#else
    return 0;
#endif
}
