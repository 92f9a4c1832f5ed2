// SPDX-License-Identifier: MIT
// Holds every line of csrc/torch_shim.h against torch's own headers; test_abi.py compiles it.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <type_traits>

namespace restated
{
#include "torch_shim.h"

static_assert(HEX_TORCH_ABI == TORCH_VERSION_2_10_0, "HEX_TORCH_ABI");

#define HOLD(result, name, parameters)                                                             \
    static_assert(std::is_same_v<decltype(::name), result parameters>, #name);
#if TORCH_FEATURE_VERSION == TORCH_VERSION_2_10_0
HEX_TORCH_FUNCTIONS(HOLD)
#else // newer ones are let in
HEX_TORCH_FUNCTIONS_2_11(HOLD)
#endif
} // namespace restated
