// SPDX-License-Identifier: MIT
// Holds every line of csrc/torch_shim.h against torch's own headers; test_abi.py compiles it.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <type_traits>

namespace restated
{
#include "torch_shim.h"

static_assert(HEX_TORCH_ABI == TORCH_VERSION_2_10_0, "HEX_TORCH_ABI");
static_assert(TORCH_FEATURE_VERSION == TORCH_VERSION_2_10_0, "or newer functions would be let in");

#define HOLD(result, name, parameters)                                                             \
    static_assert(std::is_same_v<decltype(::name), result parameters>, #name);
HEX_TORCH_FUNCTIONS(HOLD)
} // namespace restated
