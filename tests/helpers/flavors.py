"""Tiny shapes for what no option of [model] sets, such as score_function or rope_scaling.

Importing this module adds them to the flavors that a run can name: `model.flavor = "test_v3"`. They have the sizes of
"llama3_debug"; the tests' settings give the sizes that they need as options.
"""

from dataclasses import replace

from model.flavors import FLAVORS, get_flavor

BUILT_IN_FLAVORS = tuple(FLAVORS)

_TINY = get_flavor("llama3_debug")
TEST_FLAVORS = {
    # DeepSeek-V3's routing: sigmoid, groups ranked by their best two experts, scores normalized and scaled.
    "test_v3": replace(_TINY, score_function="sigmoid", n_group_topk=2, route_norm=True, route_scale=2.5),
    # DeepSeek-V2's: softmax, groups ranked by their best expert; and YaRN.
    "test_v2": replace(_TINY, rope_scaling="yarn", rope_original_seq_len=16, rope_mscale_all_dim=0.7),
    # Sigmoid scores, without and with normalization.
    "test_sigmoid": replace(_TINY, score_function="sigmoid"),
    "test_sigmoid_norm": replace(_TINY, score_function="sigmoid", route_norm=True),
}
FLAVORS.update(TEST_FLAVORS)
