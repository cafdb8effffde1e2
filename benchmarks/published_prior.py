"""Speed of sampling from a prior against the published loop (EPFL-VILAB/search-over-tokens, `generate_ids`).

The prior has the shape of FlexAR-113M-T2I: 12 blocks of width 768 with attention to a text, and 256 tokens of 64,000.
Both have the same random weights: `save_pretrained(format="flexar")` writes ours, and the published loader reads them.
They are first compared, in float32: their logits under teacher forcing, and their most likely tokens under guidance.
Then they take turns at sampling from the whole vocabulary, with the guidance of the release.

The published loop has no cache: for each token it runs all earlier tokens again, and makes logits of all positions. All
of it is timed, without extrapolation. The states of the texts are random; neither side builds a T5.

    git clone https://github.com/EPFL-VILAB/search-over-tokens && git -C search-over-tokens checkout e7564c5
    git clone https://github.com/apple/ml-l3m && git -C ml-l3m checkout e6376a3
    PYTHONPATH=search-over-tokens:ml-l3m/src python benchmarks/published_prior.py --threads 2 \\
        --json benchmarks/results/published_prior_cpu.json
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from report import median_seconds, write_results
from torch import Tensor, nn

from flextok_pl.config import PriorConfig
from flextok_pl.models.prior import Prior, TextStates

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--preset", default="113m_text", help="one of our text priors, for its size")
parser.add_argument("--depth", type=int, default=None, help="number of blocks, instead of the preset's")
parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
parser.add_argument("--num-tokens", nargs="+", type=int, default=[64, 256])
parser.add_argument("--cfg-scale", type=float, default=3.0)
parser.add_argument("--text-length", type=int, default=16, help="positions of each text")
parser.add_argument("--repeats", type=int, default=1)
parser.add_argument("--threads", type=int, default=None, help="threads of torch on the CPU")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--json", default=None, help="file to write the results to")

TOLERANCE = 1e-4  # of logits, as a share of the largest


def our_prior(preset: str, depth: int | None) -> Prior:
    """The published architecture with random weights, also in norms."""
    config = PriorConfig.preset(preset)
    assert config.text_width is not None, f"{preset} is not a prior of texts"
    config = dataclasses.replace(
        config,
        depth=depth or config.depth,
        norm="layer",
        norm_eps=1e-5,
        text_hidden_width=config.text_width,
        text_bias=False,
        text_encoder="google/flan-t5-xl",
    )
    torch.manual_seed(0)
    prior = Prior(config).eval()
    for name, parameter in prior.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, float(name.endswith("weight")), 0.1)
    return prior


def random_states(prior: Prior, texts: list[str], length: int) -> dict[str, Tensor]:
    """States (T, E) of each text, and of the empty one, which has one position with T5."""
    width = prior.config.text_width
    assert width is not None
    return {"": torch.randn(1, width)} | {text: torch.randn(length, width) for text in texts}


def published_twin(prior: Prior, states: dict[str, Tensor], device: str) -> Any:
    """The published model with our weights, around an encoder that returns the states of some texts."""
    try:
        from flextok_ar.model import text_encoder
        from flextok_ar.utils.helpers import load_model
    except ImportError as error:
        raise SystemExit(f"{error}: this benchmark needs the published packages; see its first lines") from error

    class Known(text_encoder.T5Embedder):
        """Replaces a T5: looks up its states."""

        def __init__(self, decoder_seqlen: int, text_embeddings_write_key: str, **options: Any) -> None:
            nn.Module.__init__(self)
            self.decoder_seqlen, self.text_embeddings_write_key = decoder_seqlen, text_embeddings_write_key
            self.read_key = options["read_key"]
            self.text_embeddings_mask_write_key = options["text_embeddings_mask_write_key"]
            self.singleton_value = ""

        def forward(self, data_dict: dict[str, Any], **_: Any) -> dict[str, Any]:
            padded = padded_states([states[text] for text in data_dict[self.read_key]])
            bias = self.convert_mask_to_bias(padded.mask, self.decoder_seqlen)
            data_dict[self.text_embeddings_write_key] = padded.states.to(device)
            data_dict[self.text_embeddings_mask_write_key] = bias.to(device)
            return data_dict

    text_encoder.T5Embedder = Known  # the class in the release's configuration
    with tempfile.TemporaryDirectory() as folder:
        prior.save_pretrained(Path(folder), format="flexar")
        return load_model(folder, device)[0]


def padded_states(rows: list[Tensor]) -> TextStates:
    """Pad states of texts (T_i, E) to one batch."""
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
    return TextStates(nn.utils.rnn.pad_sequence(rows, batch_first=True), mask)


@torch.no_grad()
def compare(prior: Prior, published: Any, texts: list[str], condition: TextStates, scale: float) -> dict[str, float]:
    """Largest difference of the logits, after checking it and the most likely tokens."""
    length = min(16, prior.num_tokens)
    tokens = torch.randint(prior.config.vocab_size, (len(texts), length), generator=torch.Generator().manual_seed(1))
    tokens = tokens.to(prior.device)
    data = published.model({"text": [*texts], "pred_image_token_ids": tokens[:, :-1]}, model_name="text_encoder")
    data["text_embeddings_mask"] = data["text_embeddings_mask"][:, :length]
    theirs = published.model(data, model_name="ar_image_model")[published.get_image_model().head.write_key]
    difference, largest = (prior(tokens, condition) - theirs).abs().max().item(), theirs.abs().max().item()
    if not difference <= TOLERANCE * largest:
        raise SystemExit(f"the logits differ by {difference}, but the largest is {largest}")
    greedy = published.generate_ids({"text": [*texts]}, sample=False, cfg_factor=scale, num_keep_tokens=length)
    ours = prior.generate(condition, length, cfg_scale=scale, temperature=0)
    if not torch.equal(greedy, ours):
        raise SystemExit(f"the most likely tokens differ: ours {ours.tolist()}, published {greedy.tolist()}")
    return {"largest_difference": difference, "largest_logit": largest, "equal_greedy_tokens": greedy.numel()}


def main() -> None:
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    prior, scale = our_prior(options.preset, options.depth), options.cfg_scale
    texts = [str(number) for number in range(max(options.batch_sizes))]
    states = random_states(prior, texts, options.text_length)
    published = published_twin(prior, states, options.device)
    prior.set_null_text(states[""])
    prior.to(options.device)

    def condition_of(batch: int) -> TextStates:
        return TextStates(
            *(each.to(options.device) for each in padded_states([states[text] for text in texts[:batch]]))
        )

    results: dict[str, Any] = {"logits": compare(prior, published, texts[:2], condition_of(len(texts[:2])), scale)}
    print(results, flush=True)
    for batch in options.batch_sizes:
        condition = condition_of(batch)

        def ours(count: int, condition: TextStates = condition) -> Tensor:
            return prior.generate(condition, count, cfg_scale=scale)

        def theirs(count: int, batch: int = batch) -> Tensor:
            return published.generate_ids({"text": texts[:batch]}, cfg_factor=scale, num_keep_tokens=count)

        for count in options.num_tokens:
            for sample in (ours, theirs):
                assert sample(2).shape == (batch, 2)  # warm up
            calls = {"ours": lambda: ours(count), "published": lambda: theirs(count)}  # noqa: B023  called here
            times = median_seconds(calls, options.repeats, options.device, warm_up=False)
            results[f"batch={batch} tokens={count}"] = {
                "seconds": times,
                "images_per_second": batch / times["ours"],
                "speedup": times["published"] / times["ours"],
            }
            print(batch, count, times, flush=True)
    write_results("published_prior", vars(options), results, options.json)


if __name__ == "__main__":
    main()
