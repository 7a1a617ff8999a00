#define WD_ISA avx2
#include "mover.inc"
