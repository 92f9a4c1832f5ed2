# SPDX-License-Identifier: MIT
"""The HEX loss in a training loop on made-up data: points around eight centres, in two views."""

import torch

from hex import HEXLoss

torch.manual_seed(0)
centres = torch.randn(8, 32)
model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
criterion = HEXLoss(temperature=0.1)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

for step in range(101):
    points = centres[torch.randint(8, (256,))] + 0.5 * torch.randn(256, 32)
    view0, view1 = (points + 0.2 * torch.randn(256, 32) for _ in range(2))
    loss = criterion(model(view0), model(view1))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        eps, hard, share = criterion.last
        print(f"step {step:3}  loss {loss:.3f}  eps {eps:.3f}  mean |H| {hard:.2f}")
