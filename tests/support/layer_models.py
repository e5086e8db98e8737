"""Small models for each layer rule, each option and each arrangement of samples in a batch.

All take x [samples, 24].
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from importance_models import CLASSES
from torch import nn
from torch.utils.checkpoint import checkpoint

VOCABULARY = 7


def head():
    """From anything [samples, ...]."""
    return nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(5), nn.Linear(5, CLASSES))


def stack(shape, *layers):
    return nn.Sequential(nn.Unflatten(1, shape), *layers, nn.Tanh(), head())


def conv1d(*args, **options):
    return stack((4, 6), nn.Conv1d(4, *args, **options))


def conv2d(*args, **options):
    return stack((2, 3, 4), nn.Conv2d(2, *args, **options))


def conv3d(*args, **options):
    return stack((2, 3, 2, 2), nn.Conv3d(2, *args, **options))


def tokens(x):
    return (x * 3).long().abs() % VOCABULARY


class Custom(nn.Module):
    """`forward` with the `layers`, and a head."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.function, self.head = forward, head()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.head(self.function(self, x).contiguous())


def embedded(forward, **options):
    return partial(Custom, forward, table=nn.Embedding(VOCABULARY, 3, **options))


def linear(forward, inputs=6):
    return lambda: Custom(forward, layer=nn.Linear(inputs, 5), second=nn.Linear(5, 5))


def channels_last():
    model = nn.Sequential(nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4)).to(
        memory_format=torch.channels_last
    )
    return Custom(
        lambda m, x: m.body(x.view(-1, 2, 3, 4).contiguous(memory_format=torch.channels_last)),
        body=model,
    )


def trained_norm(make):
    """With running statistics and weights that are not the initial ones."""
    model = make()
    model.train()
    with torch.no_grad():
        model(torch.randn(8, 24) + 1)
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def without(layer, name):
    """With one of its parameters only."""
    layer.register_parameter(name, None)
    return layer


def frozen_bias():
    model = conv2d(3, 2)
    model[1].bias.requires_grad_(False)
    return model


def changed_conv(padding_mode="zeros", **changes):
    """With options that are not those that the layer was made with."""
    model = conv2d(4, 3, padding=1, padding_mode=padding_mode)
    for name, value in changes.items():
        setattr(model[1], name, value)
    return model


def replaced_conv(shape, groups, kernel):
    """With a weight of another shape than the one that the layer was made with."""
    model = stack(shape, nn.Conv2d(2, 4, 2, padding=1, groups=groups))
    model[1].weight = nn.Parameter(torch.randn(4, shape[0] // groups, *kernel))
    return model


def grown_embedding():
    model = embedded(lambda m, x: m.table(tokens(x[:, :4])) * m.table(tokens(x[:, 4:8])))()
    model.table.weight = nn.Parameter(torch.randn(VOCABULARY + 4, 3))
    return model


def shared_bias():
    model = Custom(
        lambda m, x: m.second(m.first(x.view(-1, 6, 4)).tanh()),
        first=nn.Linear(4, 4),
        second=nn.Linear(4, 4),
    )
    model.second.bias = model.first.bias
    return model


def tied_embedding():
    model = Custom(
        lambda m, x: m.out(m.table(tokens(x[:, :6])).tanh()),
        table=nn.Embedding(VOCABULARY, 3, padding_idx=2),
        out=nn.Linear(3, VOCABULARY),
    )
    model.out.weight = model.table.weight
    return model


class Pair(nn.Module):
    """Returns a tuple."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(6, 5), nn.Linear(18, 5)

    def forward(self, x):
        return self.left(x[:, :6]), self.right(x[:, 6:])


def _time_major(m, x):
    rows = x.view(len(x), 4, 6).transpose(0, 1).reshape(-1, 6)
    return m.second(m.layer(rows).tanh()).view(4, len(x), 5).transpose(0, 1)


def _without_gradient(m, x):
    with torch.no_grad():
        fixed = m.layer(x[:, :6])
    return fixed * m.second(m.layer(x[:, 6:12]).tanh())


CONVOLUTIONS = {
    "1d": partial(conv1d, 6, 3),
    "1d strided": partial(conv1d, 6, 3, stride=2, padding=1),
    "1d same": partial(conv1d, 6, 4, padding="same", dilation=2),
    "1d valid": partial(conv1d, 6, 3, padding="valid", bias=False),
    "1d circular": partial(conv1d, 4, 3, padding=2, padding_mode="circular"),
    "1d window skips inputs": partial(conv1d, 4, 2, stride=3),
    "2d": partial(conv2d, 3, (2, 3), stride=(1, 2), padding=(1, 2)),
    "2d dilated": partial(conv2d, 3, 2, dilation=(1, 2)),
    "2d groups": partial(conv2d, 6, 2, groups=2, padding=1),
    "2d depthwise": partial(conv2d, 4, 2, groups=2),
    "2d reflect": partial(conv2d, 3, 3, padding=1, padding_mode="reflect"),
    "2d replicate same": partial(conv2d, 3, (1, 2), padding="same", padding_mode="replicate"),
    "2d pointwise": partial(conv2d, 3, 1),
    "2d whole": partial(conv2d, 3, (3, 4)),
    "2d channels last": channels_last,
    "2d frozen bias": frozen_bias,
    "2d with dilation and padding set later": partial(
        changed_conv, padding=(2, 1), dilation=(2, 1), stride=1
    ),
    "2d with padding by one number, set later": partial(changed_conv, padding=0),
    "2d with padding same, set later": partial(changed_conv, padding="same", dilation=(1, 2)),
    "2d with padding valid, set later": partial(changed_conv, padding="valid"),
    "2d reflect with padding set later": partial(changed_conv, "reflect", padding=0),
    "2d with the weight of one channel": partial(replaced_conv, (1, 4, 6), 1, (2, 2)),
    "2d with the weight of more channels": partial(replaced_conv, (4, 2, 3), 2, (1, 3)),
    "2d frames, sample-major": lambda: Custom(
        lambda m, x: m.conv(x.view(-1, 2, 3, 2)).flatten(1).view(len(x), -1),
        conv=nn.Conv2d(2, 4, 2, groups=2),
    ),
    "2d called twice": lambda: Custom(
        lambda m, x: m.conv(m.conv(x.view(-1, 2, 3, 4)).tanh()), conv=nn.Conv2d(2, 2, 2, padding=1)
    ),
    "transposed 1d": lambda: stack((4, 6), nn.ConvTranspose1d(4, 2, 3), nn.Conv1d(2, 3, 2)),
    "transposed 2d": lambda: stack(
        (4, 2, 3),
        nn.ConvTranspose2d(4, 6, (2, 3), stride=2, padding=(1, 0), output_padding=1, groups=2),
    ),
    "transposed 3d": lambda: stack(
        (3, 2, 2, 2), nn.ConvTranspose3d(3, 2, 2, dilation=(1, 2, 1), bias=False)
    ),
    "3d": partial(conv3d, 4, 2, padding=(1, 0, 1)),
    "3d groups": partial(conv3d, 4, (2, 1, 2), groups=2, stride=(1, 1, 2)),
}

ARRANGEMENTS = {
    "batch-first": linear(lambda m, x: m.second(m.layer(x.view(-1, 4, 6)).tanh())),
    "more dimensions": linear(lambda m, x: m.second(m.layer(x.view(-1, 2, 2, 6)).tanh())),
    "sequence-first": linear(
        lambda m, x: m.second(m.layer(x.view(-1, 4, 6).transpose(0, 1)).tanh()).transpose(0, 1)
    ),
    "last of a sequence": linear(
        lambda m, x: m.second(m.layer(x.view(-1, 4, 6).transpose(0, 1)).tanh()[-1])
    ),
    "flattened, sample-major": linear(
        lambda m, x: m.second(m.layer(x.reshape(-1, 6)).tanh()).view(len(x), 4, 5)
    ),
    "flattened, time-major": linear(_time_major),
    "in place": linear(lambda m, x: m.second(F.relu(m.layer(x.view(-1, 4, 6)), inplace=True))),
    "by keyword": linear(lambda m, x: m.second(input=m.layer(input=x.view(-1, 4, 6)).tanh())),
    "called on rows and on tokens": linear(
        lambda m, x: m.layer(x.view(-1, 4, 6)).mean(1) * m.layer(x[:, :6]) + m.second.bias.detach()
    ),
    "without gradient": linear(_without_gradient),
    "half of the features elsewhere": lambda: Custom(
        lambda m, x: torch.cat([m.body(x[:, :12]), x[:, 12:].tanh()], 1), body=nn.Linear(12, 6)
    ),
    "tuple": lambda: Custom(lambda m, x: torch.mul(*m.pair(x)), pair=Pair()),
    "shared bias": shared_bias,
    "checkpointed": linear(
        lambda m, x: checkpoint(
            lambda h: m.second(F.relu(m.layer(h))), x.view(-1, 4, 6), use_reentrant=False
        )
    ),
}

EMBEDDINGS = {
    "embedding": embedded(lambda m, x: m.table(tokens(x))),
    "embedding of one token": embedded(lambda m, x: m.table(tokens(x[:, 0]))),
    "embedding with padding": embedded(lambda m, x: m.table(tokens(x)).tanh(), padding_idx=2),
    "embedding of int32": embedded(lambda m, x: m.table(tokens(x).int())),
    "sparse embedding": embedded(lambda m, x: m.table(tokens(x)), sparse=True),
    "embedding, sequence-first": embedded(
        lambda m, x: m.table(tokens(x[:, :4]).T).tanh().transpose(0, 1)
    ),
    "embedding called twice": embedded(
        lambda m, x: m.table(tokens(x[:, :4])) * m.table(tokens(x[:, 4:8]))
    ),
    "tied embedding": tied_embedding,
    "grown embedding called twice": grown_embedding,
}

NORMS = {
    name: partial(trained_norm, make)
    for name, make in {
        "batch norm": lambda: Custom(lambda m, x: m.n(x), n=nn.BatchNorm1d(24)),
        "batch norm 1d": lambda: stack((4, 6), nn.BatchNorm1d(4)),
        "batch norm 2d": lambda: stack((2, 3, 4), nn.BatchNorm2d(2), nn.Conv2d(2, 3, 2)),
        "batch norm 3d": lambda: stack((2, 3, 2, 2), nn.BatchNorm3d(2)),
        "batch norm twice": lambda: Custom(
            lambda m, x: m.n(m.n(x.view(-1, 4, 6)).tanh()), n=nn.BatchNorm1d(4)
        ),
        "batch norm without weight": lambda: stack((4, 6), without(nn.BatchNorm1d(4), "weight")),
        "batch norm without bias": lambda: stack((4, 6), without(nn.BatchNorm1d(4), "bias")),
        "layer norm": lambda: stack((4, 6), nn.LayerNorm(6)),
        "layer norm of two dimensions": lambda: stack((2, 3, 4), nn.LayerNorm((3, 4), bias=False)),
        "layer norm, sequence-first": lambda: Custom(
            lambda m, x: m.n(x.view(-1, 4, 6).transpose(0, 1)).transpose(0, 1), n=nn.LayerNorm(6)
        ),
        "group norm": lambda: stack((4, 2, 3), nn.GroupNorm(2, 4)),
        "group norm of vectors": lambda: stack((24,), nn.GroupNorm(3, 24)),
        "RMS norm": lambda: stack((4, 6), nn.RMSNorm(6)),
        "RMS norm with eps": lambda: stack((4, 6), nn.RMSNorm((4, 6), eps=0.1)),
        "instance norm": lambda: stack((4, 6), nn.InstanceNorm1d(4, affine=True)),
        "instance norm 2d with statistics": lambda: stack(
            (2, 3, 4), nn.InstanceNorm2d(2, affine=True, track_running_stats=True)
        ),
    }.items()
}


def sequences(m, x):
    return x.view(-1, 4, 6)


def _positions(m, x):
    return (m.layer(sequences(m, x)) + m.table(torch.arange(4, device=x.device))).tanh()


def weight_norm():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))
    return Custom(lambda m, x: m.layer(sequences(m, x)), layer=layer)


class Attention(nn.Module):
    """Attention from x to other widths of key and value, with biases for them."""

    def __init__(self, **options):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.body = nn.MultiheadAttention(6, 3, batch_first=True, **options)
        self.head = head()

    def forward(self, x):
        hidden = self.layer(sequences(self, x))
        key = hidden[..., : self.body.kdim]
        return self.head(self.body(hidden, key, key[..., : self.body.vdim])[0])


class Positions(nn.Module):
    """Parameters that are broadcast to the samples in different ways."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 5), head()
        self.first = nn.Parameter(torch.randn(1, 1, 5))
        self.places = nn.Parameter(torch.randn(1, 10, 5))
        self.scale = nn.Parameter(torch.randn(5))
        self.by_place = nn.Parameter(torch.randn(5, 1))
        self.temperature = nn.Parameter(torch.randn(()))
        self.shift = nn.Parameter(torch.randn(2, 5))

    def forward(self, x):
        hidden = self.layer(sequences(self, x))
        hidden = torch.cat([self.first.expand(len(x), -1, -1), hidden], 1) + self.places[:, :5]
        hidden = (hidden * (1 + self.scale)).tanh() * self.by_place - self.shift[1]
        turned = hidden.transpose(0, 1) + self.places[0, 5:].unsqueeze(1)  # tokens first
        return self.head((turned.transpose(0, 1) * self.temperature).contiguous())


class Packed(nn.Module):
    """Recurrent layers over sequences of different lengths."""

    def __init__(self, kind, **options):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 5), head()
        self.cell = kind(5, 3, batch_first=True, **options)

    def forward(self, x):
        lengths = (tokens(x[:, 0]) % 4 + 1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(
            self.layer(sequences(self, x)), lengths, batch_first=True, enforce_sorted=False
        )
        padded, _ = nn.utils.rnn.pad_packed_sequence(
            self.cell(packed)[0], batch_first=True, total_length=4
        )
        return self.head(padded)


class Conv1D(nn.Module):
    """A linear layer with the weight the other way round, as in GPT-2."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        rows = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return rows.view(*x.shape[:-1], -1)


class OwnNorm(nn.LayerNorm):
    """A norm by channels in the second dimension, as timm has them."""

    def forward(self, x):
        turned = F.layer_norm(
            x.transpose(1, -1), self.normalized_shape, self.weight, self.bias, self.eps
        )
        return turned.transpose(1, -1)


class OwnBatchNorm(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        ).relu()


class OwnGroupNorm(nn.GroupNorm):
    def forward(self, x):
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, 1, self.groups)


class OwnEmbedding(nn.Embedding):
    def forward(self, x):
        return F.embedding(x, self.weight, self.padding_idx) * 3


class Inheriting(nn.Linear):
    """Computes what its base does."""


class Standardised(nn.Conv1d):
    """With weights of mean 0 and variance 1 in each channel, times a gain."""

    def __init__(self, *args):
        super().__init__(*args)
        self.gain = nn.Parameter(torch.rand(self.out_channels) + 0.5)

    def forward(self, x):
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, weight=self.gain * 0.5, training=True)
        return F.conv1d(x, weight.view_as(self.weight), self.bias)


class RelativePositions(nn.Module):
    """Tables with an entry for each distance, from which all pairs of places take theirs."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 5), head()
        self.table = nn.Parameter(torch.randn(7, 2))
        self.embedding = nn.Embedding(7, 3)
        place = torch.arange(4)
        self.register_buffer("distance", place[:, None] - place + 3)

    def forward(self, x):
        hidden = self.layer(sequences(self, x))
        weights = (hidden @ hidden.transpose(1, 2)).unsqueeze(1)  # [samples, 1, places, places]
        own = self.table[self.distance.flatten()].view(4, 4, -1).permute(2, 0, 1)
        shared = self.embedding(self.distance).permute(2, 0, 1).unsqueeze(0)
        scores = torch.cat([weights + own, weights + shared], 1).softmax(-1)
        return self.head((scores @ hidden.unsqueeze(1)).tanh())


def bag(forward, **options):
    return partial(Custom, forward, table=nn.EmbeddingBag(VOCABULARY, 3, **options))


def ragged_bags(m, x):
    """Of different sizes, two for a sample, of which some are empty."""
    sizes = tokens(x[:, :2]).flatten() % 4
    chosen = torch.arange(12, device=x.device) < sizes.view(-1, 1)
    words = tokens(x.reshape(-1, 12))[chosen]
    starts = sizes.cumsum(0) - sizes
    return m.table(words, starts).view(len(x), -1).tanh()


def tied_scaled():
    model = Custom(
        lambda m, x: m.out(m.table(tokens(x[:, :6])).tanh()),
        table=OwnEmbedding(VOCABULARY, 3, padding_idx=2),
        out=nn.Linear(3, VOCABULARY),
    )
    model.out.weight = model.table.weight
    return model


def recurrent_with_head(kind, **options):
    return lambda: Custom(
        lambda m, x: m.cell(m.layer(sequences(m, x)))[0],
        layer=nn.Linear(6, 5),
        cell=kind(5, 3, batch_first=True, **options),
    )


def encoder(**options):
    return lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.1, **options)


# What no layer's rule covers, but the rules of autograd's nodes.
BY_GRAPH = {
    "transformer": lambda: Custom(
        lambda m, x: m.body(sequences(m, x)), body=encoder(batch_first=True)()
    ),
    "transformer, sequence-first": lambda: Custom(
        lambda m, x: m.body(sequences(m, x).transpose(0, 1)).transpose(0, 1),
        body=encoder(norm_first=True)(),
    ),
    "attention": Attention,
    "attention to other widths": partial(Attention, kdim=5, vdim=4),
    "attention with more biases": partial(Attention, add_bias_kv=True),
    "attention without bias": partial(Attention, bias=False),
    "parameters by themselves": Positions,
    "positions in a table": lambda: Custom(
        _positions, layer=nn.Linear(6, 5), table=nn.Embedding(4, 5)
    ),
    "PReLU": lambda: stack((4, 6), nn.PReLU(4), nn.Conv1d(4, 3, 2), nn.PReLU()),
    "LSTM": recurrent_with_head(nn.LSTM, num_layers=2, bidirectional=True),
    "LSTM, projected": recurrent_with_head(nn.LSTM, proj_size=2, bias=False),
    "GRU": recurrent_with_head(nn.GRU, bidirectional=True),
    "RNN": recurrent_with_head(nn.RNN, nonlinearity="relu"),
    "LSTM, packed": partial(Packed, nn.LSTM, num_layers=2),
    "GRU, packed": partial(Packed, nn.GRU, bidirectional=True),
    "RNN, packed": partial(Packed, nn.RNN),
    "Conv1D": lambda: Custom(
        lambda m, x: m.second(m.layer(sequences(m, x)).tanh()),
        layer=Conv1D(6, 5),
        second=Conv1D(5, 3),
    ),
    "norms with a forward of their own": lambda: trained_norm(
        lambda: stack((2, 3, 4), OwnNorm(2), OwnBatchNorm(2), OwnGroupNorm(1, 2))
    ),
    "convolution with a forward of its own": lambda: stack(
        (4, 2, 3), OwnConv(4, 6, 2, padding=1, groups=2)
    ),
    "linear layers that inherit": lambda: stack((4, 6), Inheriting(6, 5)),
    "embedding with a forward of its own": lambda: Custom(
        lambda m, x: m.table(tokens(x)), table=OwnEmbedding(VOCABULARY, 3, padding_idx=1)
    ),
    "tied embedding, scaled": tied_scaled,
    "bags": bag(lambda m, x: m.table(tokens(x.view(-1, 4))).view(len(x), -1), mode="sum"),
    "bags' means": bag(lambda m, x: m.table(tokens(x)).tanh(), padding_idx=2),
    "bags of different sizes": bag(ragged_bags),
    "weighted bags": bag(
        lambda m, x: m.table(tokens(x), per_sample_weights=x.tanh()).tanh(), mode="sum"
    ),
    "behind another parameter": lambda: Custom(
        lambda m, x: m.layer(x[:, :12]) * m.second(m.scale(x[:, 12:])),
        layer=nn.Linear(12, 5),
        scale=nn.PReLU(12),
        second=nn.Linear(12, 5),
    ),
    "weight from the left": lambda: Custom(
        lambda m, x: (m.layer.weight @ x[:, :6].T).T.tanh() @ m.second.weight,
        layer=nn.Linear(6, 5, bias=False),
        second=nn.Linear(4, 5, bias=False),
    ),
    "weight norm": weight_norm,
    "standardised weights": lambda: stack((4, 6), Standardised(4, 3, 2)),
    "relative positions": RelativePositions,
    "used within and without": lambda: Custom(
        lambda m, x: F.linear(m.layer(x[:, :6]).tanh(), m.layer.weight), layer=nn.Linear(6, 6)
    ),
}

RULED = {**CONVOLUTIONS, **ARRANGEMENTS, **EMBEDDINGS, **NORMS, **BY_GRAPH}


# What the rules leave to torch.func: names of those parameters begin with these.
FALLBACK = {
    "bilinear": (
        lambda: Custom(
            lambda m, x: m.body(x[:, :6], m.layer(x[:, 6:12])),
            layer=nn.Linear(6, 6),
            body=nn.Bilinear(6, 6, 5),
        ),
        ["body.weight"],
    ),
    "frequency": (
        embedded(lambda m, x: m.table(tokens(x)).tanh(), scale_grad_by_freq=True),
        ["table"],
    ),
    "largest of a bag": (bag(lambda m, x: m.table(tokens(x)).tanh(), mode="max"), ["table"]),
    "overlapping parts": (
        lambda: Custom(
            lambda m, x: x[:, :5] * m.layer.weight[0, :5] + x[:, 5:10] * m.layer.weight[0, 1:],
            layer=nn.Linear(6, 1, bias=False),
        ),
        ["layer"],
    ),
}
