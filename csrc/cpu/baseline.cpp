#define WD_ISA baseline
#include "mover.inc"
