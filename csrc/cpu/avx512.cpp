#define WD_ISA avx512
#include "mover.inc"
