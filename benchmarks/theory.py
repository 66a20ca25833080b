"""Draw docs/vanishing.png: how a passive weight shrinks, step by step, and how fast it can.

python benchmarks/theory.py [--png FILE]
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from gsm_sgd.decay import PassiveWeight, decay_for_rate, fastest_rate

_COLOURS = ("#000000", "#0072B2", "#009E73", "#D55E00")


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--png", type=Path, default=Path("docs/vanishing.png"))
    options = parser.parse_args()
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    paths, rates = figure.subplots(1, 2)

    lr, momentum, steps = 0.1, 0.95, 400
    critical = decay_for_rate(0.0, lr, momentum)
    for share, colour in zip((0.1, 0.5, 1.0, 4.0), _COLOURS, strict=True):
        passive, weights = PassiveWeight(), [1.0]
        for _ in range(steps):
            passive = passive.step(lr, share * critical, momentum)
            weights.append(abs(passive.weight))
        paths.plot(weights, color=colour, linewidth=1.3, label=f"{share:g} of the critical decay")
    paths.set_yscale("log")
    paths.set_ylim(1e-5, 1.3)
    paths.set_xlabel("steps")
    paths.set_title("|w| of a passive weight, beta = .95", fontsize=10)
    paths.legend(frameon=False, fontsize=8, loc="lower left")

    for beta, colour in zip((0.9, 0.95, 0.98, 0.99), _COLOURS, strict=True):
        slowest = [1 - (1 - fastest_rate(beta)) * place / 200 for place in range(1, 201)]
        x = [decay_for_rate(rate, 1.0, beta) for rate in slowest]
        rates.plot(x, [1 - rate for rate in slowest], color=colour, linewidth=1.3, label=f"beta = {beta:g}")
        rates.plot(x, [product / (1 - beta) for product in x], color=colour, linewidth=0.8, linestyle=":")
        rates.plot(x[-1:], [1 - slowest[-1]], "o", color=colour, markersize=4)
    rates.set_xscale("log")
    rates.set_yscale("log")
    rates.set_xlim(1e-6, 5e-3)
    rates.set_ylim(1e-4, 0.1)
    rates.set_xlabel("alpha eta")
    rates.set_title("share lost per step; dotted: the paper's formula", fontsize=10)
    rates.legend(frameon=False, fontsize=8)
    for axes in (paths, rates):
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.png, dpi=150)


if __name__ == "__main__":
    main()
