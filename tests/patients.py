"""Small networks whose robustness is known, for the chapters that doubt an attack."""
import torch
from torch import nn


class Scale(nn.Module):
    "Logits times a number: the same decisions."

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, logits):
        return self.factor * logits


def linear(classes=5, size=6, seed=1):
    "A linear model, images away from 0 and 1, and labels it mostly gets right."
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(size * size, classes))
    x = 0.3 + 0.4 * torch.rand(12, 1, size, size)
    y = model(x).argmax(1)
    y[::6] = (y[::6] + 1) % classes
    return model, x, y


def optimum(model, x, y, eps):
    "Who survives every perturbation of at most eps per pixel: the margin against each class, in closed form."
    w, b = model[1].weight.detach(), model[1].bias.detach()
    apart = w[y][:, None] - w
    margin = torch.einsum("njd,nd->nj", apart, x.flatten(1)) + b[y][:, None] - b - eps * apart.abs().sum(2)
    return (margin.scatter(1, y[:, None], 1.0) > 0).all(1)


def quadrants():
    "A small network that tells which quadrant of an image is bright, and the images."
    torch.manual_seed(0)
    y = torch.randint(4, (256,))
    x = 0.35 * torch.rand(256, 1, 12, 12)
    for image, q in zip(x, y):
        image[:, 6 * (q // 2):6 * (q // 2) + 6, 6 * (q % 2):6 * (q % 2) + 6] += 0.25
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(3), nn.Flatten(),
                          nn.Dropout(0.1), nn.Linear(8 * 16, 4))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    optimizer.zero_grad()
    return model.eval(), x[:24], y[:24]
