// Refuses other targets than Hopper's own. The entry headers include it before CuTe, which would say something else.
#pragma once

// For plain sm_90 CuTe compiles WGMMA to a trap that shows only when the kernel runs, hence this check. The host, whose
// compiler defines no __CUDA_ARCH__, may include these headers.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "Hopper's kernels must be compiled for sm_90a: plain sm_90 lacks their instructions (WGMMA, setmaxnreg)"
#endif
