"""What tests hold our code against, in plain torch."""

import torch


def statistics_by_hand(model):
    """{batch norm: (mean, variance)}, moved beside torch's own statistics by every forward in train mode: a
    tenth of the way towards the batch's, with the unbiased variance."""
    def move(norm, inputs):
        if norm.training:
            channels = inputs[0].detach().transpose(0, 1).flatten(1)  # (C, B * H * W)
            mean, var = statistics[norm]
            statistics[norm] = 0.9 * mean + 0.1 * channels.mean(1), 0.9 * var + 0.1 * channels.var(1)

    statistics = {m: (m.running_mean.clone(), m.running_var.clone())
                  for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)}
    for norm in statistics:
        norm.register_forward_pre_hook(move)
    return statistics
