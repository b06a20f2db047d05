"""Parts of the memory model, and suggestions, against numbers that are written out by hand."""

import dataclasses

import pytest

from mixtral_run.planner.memory_model import execution, memory, saved_copy_bytes
from mixtral_run.planner.suggestions import _more_gpus
from mixtral_run.planner.workload import Layout, Workload


def test_a_trained_router_keeps_its_input_in_fp32() -> None:
    layout = Layout(1, 8, "none")
    frozen, trained = (memory(Workload(train_also=names), layout) for names in ((), ("router",)))
    # 32 layers, 4,096 columns of 4 bytes for each token.
    assert trained.activations - frozen.activations == 32 * 4096 * 4 * Workload().seq_length


def test_attention_in_8_bit_takes_what_bf16_takes_and_its_scales() -> None:
    """Two copies of one byte for two bytes; an fp32 scale for each row and column, of which TP splits one side."""
    for tp, sides in ((1, 32 * (6144 + 4096 + 2 * 4096) + 32000 + 4096), (2, 32 * (3072 + 2048 + 2 * 4096) + 20096)):
        whole, small = (
            memory(Workload(gpus=2, attention_precision=each), Layout(tp, 2, "none")).weights
            for each in ("bf16", "fp8")
        )
        assert small - whole == 4 * sides
    fp32 = Workload(gpus=1, weight_bytes=4, expert_bytes=4)
    apart = [
        memory(dataclasses.replace(fp32, attention_precision=each), Layout(1, 1, "none")).weights
        for each in ("fp32", "fp8")
    ]
    # 32 layers of two weights, and the output layer, each two bytes less.
    weights = 4096 * (32 * (6144 + 4096) + 32000)
    assert apart[0] - apart[1] == 2 * weights - 4 * (32 * 18432 + 36096)


def test_the_copy_of_a_save_in_the_background_has_each_parameter_once() -> None:
    # Mixtral 8x7B at rank 16, by hand: 32 layers × 16 × (in + out) of each linear layer, 8 experts.
    attention = (4096 + 6144) + (4096 + 4096)
    experts = 8 * ((4096 + 2 * 14336) + (14336 + 4096))
    whole = 12 * 32 * 16 * (attention + experts)
    one_host = Workload(gpus=8)
    assert saved_copy_bytes(one_host, Layout(1, 8, "none")) == saved_copy_bytes(one_host, Layout(2, 4, "none")) == whole
    # Two hosts of one GPU each: half of the experts, and at most all of attention.
    two = Workload(gpus=2, gpus_per_host=1)
    assert saved_copy_bytes(two, Layout(1, 2, "none")) == 12 * 32 * 16 * (attention + experts / 2)


def test_an_evaluation_needs_its_loss_and_one_layer_next_to_a_captured_pass() -> None:
    layout, run = Layout(1, 1, "none"), Workload(gpus=1, seq_length=512)
    without, with_one = (memory(dataclasses.replace(run, has_validation=each), layout) for each in (False, True))
    # By hand: 4 bytes a logit; two rows a token with gate, up and their product, and four of the hidden size, bf16.
    loss = 512 * 32000 * 4
    layer = 2 * 512 * 2 * (3 * 14336 + 4 * 4096)
    assert execution(run, layout).captured
    assert with_one.buffers - without.buffers == pytest.approx(loss + layer)
    eager = dataclasses.replace(run, has_validation=True, cuda_graphs=False)
    assert memory(eager, layout).buffers == memory(dataclasses.replace(eager, has_validation=False), layout).buffers


def test_only_more_gpus_than_there_are_are_suggested() -> None:
    assert [flags for flags, _ in _more_gpus(Workload(gpus=4))][:3] == ["--gpus 8", "--gpus 16", "--gpus 32"]
    assert [each.gpus for _, each in _more_gpus(Workload(gpus=3))][:2] == [4, 8]


def test_logits_need_copies_where_the_vocabulary_is_split_or_in_fp32() -> None:
    """A model whose loss is its largest part: value and gradient in bf16, else also an exponential in fp32."""
    shape = dataclasses.replace(Workload().architecture, ffn_hidden_size=8, vocab_size=320000)
    run = Workload(architecture=shape, gpus=2, seq_length=4096)
    assert memory(run, Layout(1, 1, "full")).buffers == 4096 * 320000 * (2 + 2)
    assert memory(run, Layout(2, 1, "full")).buffers == 4096 * 320000 // 2 * (2 + 4 + 2)
    whole = dataclasses.replace(run, weight_bytes=4, expert_bytes=4)
    assert memory(whole, Layout(1, 1, "full")).buffers == 4096 * 320000 * 8
