"""Query convolution: against torch's conv1d, at document boundaries, token by token."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from tests.unit.memory_helpers import MODEL, inputs, make_layer, run
from ultramem_ds.model.memory.query import CausalConv


def make_conv(kernel_size=4):
    conv = CausalConv(MODEL.hidden_size, kernel_size).double()
    torch.nn.init.normal_(conv.weight, generator=torch.Generator().manual_seed(0))
    return conv


@pytest.mark.parametrize("kernel_size", [1, 2, 4])
def test_conv_is_causal_depthwise(kernel_size):
    conv, x = make_conv(kernel_size), inputs(2, 9)
    padded = F.pad(x.transpose(1, 2), (kernel_size - 1, 0))
    expected = F.conv1d(padded, conv.weight.T[:, None], groups=MODEL.hidden_size).transpose(1, 2)
    # One reordered sum of four products.
    torch.testing.assert_close(conv(x, None, None)[0], expected, rtol=1e-12, atol=1e-12)


def test_conv_stops_at_documents():
    conv, x = make_conv(), inputs(2, 9)
    starts = torch.zeros(2, 9, dtype=torch.bool)
    starts[0, 3], starts[0, 4], starts[1, 8] = True, True, True
    out, _ = conv(x, starts, None)
    for row, bounds in ((0, (0, 3, 4, 9)), (1, (0, 8, 9))):
        for begin, end in pairwise(bounds):
            alone, _ = conv(x[row : row + 1, begin:end], None, None)
            torch.testing.assert_close(out[row, begin:end], alone[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("split", [(1,) * 9, (4, 1, 1, 3), (2, 7)])
def test_layer_decodes_like_the_whole_sequence(split):
    layer, x = make_layer(query_conv=4).eval(), inputs(2, 9)
    whole = run(layer, x)
    state, parts = None, []
    for part in x.split(split, dim=1):
        pending = layer.start(part, conv_state=state)
        parts.append(layer.finish(pending))
        state = pending.conv_state
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-12)


def test_layer_without_conv_has_no_state():
    assert make_layer(query_conv=0).start(inputs()).conv_state is None
