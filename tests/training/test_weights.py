"""What is done to a module's weights and blocks for the time of training."""

import numpy as np
import torch
from tasks import N, recorded, seeded, train, weights
from torch import nn

from madad._runtime.random import isolated_seed
from madad.nn.layers import RecomputedBlock
from madad.training import Trainer


def test_weights_end_as_their_exponential_moving_average():
    seen, decay = [], 0.9
    trainer = Trainer(10, batch_size=8, learning_rate=0.05, ema_decay=decay)
    module, _ = train(trainer, loss=recorded(sink=seen))
    validated = []
    train(trainer, validation_loss=recorded(sink=validated), n_validation=1)
    assert torch.equal(validated[-1][1], weights(module))
    last, _ = train(Trainer(**(trainer.get_params() | {"ema_decay": 0.0})))
    after_each_step = [values.double().numpy() for _, values in seen[1:]] + [weights(last).double().numpy()]
    average = np.zeros(4)
    for step, values in enumerate(after_each_step):
        kept = min(decay, (1 + step) / (10 + step))
        average = kept * average + (1 - kept) * values
    np.testing.assert_allclose(weights(module), average, rtol=1e-5)
    assert np.abs(average - after_each_step[-1]).max() > 1e-3


def test_channels_last_is_for_the_time_of_training():
    def loss(module, index, generator, step):
        layouts.append(module.weight.is_contiguous(memory_format=torch.channels_last))
        return module(images[index]).square().mean(), {}

    layouts, results = [], []
    images = torch.randn(N, 3, 6, 6, generator=seeded(2))
    for channels_last in (False, True):
        with isolated_seed(0):
            module = nn.Conv2d(3, 4, 3)
        start = module.weight
        train(Trainer(4, batch_size=8, channels_last=channels_last), module, loss)
        assert module.weight is start and module.weight.is_contiguous()
        results.append(weights(module))
    assert layouts == [False] * 12 + [True] * 12
    np.testing.assert_allclose(*results, atol=1e-5)


def test_activation_checkpointing_computes_blocks_again_and_changes_no_bit():
    class Block(RecomputedBlock):
        calls = 0

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def compute(self, x):
            Block.calls += 1
            return torch.dropout(torch.tanh(self.linear(x)), 0.3, self.training)

    ends = []
    for again in (False, True):
        Block.calls = 0
        with isolated_seed(3):
            module = nn.Sequential(Block(), nn.Linear(3, 1))
            trained, _ = train(Trainer(2, batch_size=8, activation_checkpointing=again), module)
        ends.append(weights(trained))
        assert Block.calls == 6 * (1 + again)
        assert not module[0].recompute  # as before
    assert torch.equal(*ends)
