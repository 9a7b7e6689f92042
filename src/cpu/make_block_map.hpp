#pragma once

#include "flashcute/policy/block_map_rules.hpp"

namespace flashcute::cpu {

/// Makes the maps that `rules` describe.
void make_block_map(BlockMapRules const& rules);

}  // namespace flashcute::cpu
