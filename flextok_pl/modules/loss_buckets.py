"""Mean loss by flow time and by token budget."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from flextok_pl.contracts import default_budgets
from flextok_pl.models.objective import TrainingDraws
from flextok_pl.transfer import send


class LossBuckets(Metric):
    """Averages of per-sample losses over quarters of the flow time and over powers of two of the budget.

    A budget k belongs to the smallest power of two (or K = `num_registers`) that is at least k; images without
    condition belong to no budget.
    """

    sums: Tensor
    counts: Tensor

    def __init__(self, num_registers: int) -> None:
        super().__init__()
        self.budgets = default_budgets(num_registers)
        size = 4 + len(self.budgets)
        self.add_state("sums", torch.zeros(size), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(size), dist_reduce_fx="sum")

    def update(self, loss: Tensor, draws: TrainingDraws) -> None:
        """Add (B,) losses made with `draws`."""
        quarter = (draws.t * 4).long().clamp(0, 3)
        budget = torch.searchsorted(torch.tensor(self.budgets), draws.num_tokens)
        of_budgets = F.one_hot(budget, len(self.budgets)) * ~draws.null[:, None]
        belongs = torch.cat([F.one_hot(quarter, 4), of_budgets], dim=1).float()  # (B, buckets)
        belongs = send(belongs, loss.device)
        self.sums += (loss.detach().float()[:, None] * belongs).sum(0)
        self.counts += belongs.sum(0)

    def compute(self) -> Tensor:
        """(4 + number of budgets,) means, NaN without samples."""
        return self.sums / self.counts

    def compute_and_reset(self, prefix: str) -> dict[str, Tensor]:
        """Return the means of the buckets that had samples, by name, and reset all."""
        names = [f"{prefix}/loss_t/{q}" for q in ("0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00")]
        names += [f"{prefix}/loss_k/{budget:03d}" for budget in self.budgets]
        values = dict(zip(names, self.compute(), strict=True))
        self.reset()
        return {name: value for name, value in values.items() if not torch.isnan(value)}
