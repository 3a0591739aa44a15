// Training-mode batch normalization of channels_last activations on raw memory.
//
// x is [rows, channels], contiguous fp32; every array of one value a channel is fp32. No output may overlap an input.
// Sums are fp32 within runs of a few rows and fp64 beyond, in a fixed order: the number of threads changes no bit.
#pragma once
#include <cstdint>

namespace pqk {

// out = (x - mean) * rstd * weight + bias with the biased variance and rstd = 1 / sqrt(variance + eps). A null weight
// is 1, a null bias 0. However far the mean is from 0, the variance errs by a few parts in 2^24, by less than 2^-17 of
// itself for the oddest order of outliers.
void batch_norm(const float* x, int64_t rows, int64_t channels, const float* weight, const float* bias, float eps,
                float* out, float* mean, float* variance, float* rstd);

// grad_weight = sum(g xhat), grad_bias = sum(g), grad_x = weight * rstd * (g - mean(g) - xhat * mean(g xhat)), where
// xhat = (x - mean) * rstd. What is null is not wanted.
void batch_norm_backward(const float* grad, const float* x, int64_t rows, int64_t channels, const float* weight,
                         const float* mean, const float* rstd, float* grad_x, float* grad_weight, float* grad_bias);

}  // namespace pqk
