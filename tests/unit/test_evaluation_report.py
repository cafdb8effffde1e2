"""Tables, files and plots of results."""

import json

import pytest
from PIL import Image

from flextok_pl.evaluation.report import Results, draw_budgets, make_records, write_json

VALUES = {1: {"fd": 1234.5, "mse": 0.5}, 16: {"fd": 9.87654, "mse": 0.00012}}
PROTOCOL = {"num_samples": 7, "bits_per_token": None}


def test_records_carry_the_protocol():
    records = make_records(VALUES, {"seed": 3}, {"fd": {"full_rank": True}})
    assert len(records) == 4
    assert records[0] == {"metric": "fd", "value": 1234.5, "num_tokens": 1, "seed": 3, "full_rank": True}
    assert records[3] == {"metric": "mse", "value": 0.00012, "num_tokens": 16, "seed": 3}


def test_table(tmp_path):
    lines = Results(VALUES, PROTOCOL, {}, {}, "a title", ["a note"]).table(tmp_path).splitlines()
    assert [line.split() for line in (lines[0], *lines[2:4])] == [
        ["tokens", "fd", "mse"],
        ["1", "1234", "0.5000"],
        ["16", "9.8765", "0.00012"],
    ]
    assert len({len(line) for line in lines[:4]}) == 1
    assert lines[4:] == [f"a title; protocol and pictures: {tmp_path}", "a note"]


def test_files(tmp_path):
    results = Results(VALUES, PROTOCOL | {"bits_per_token": 10.0}, {}, {}, "a title", [])
    results.write(tmp_path / "new", "rfid")
    records = json.loads((tmp_path / "new/rfid.json").read_text())
    assert [record["bits_per_image"] for record in records] == [10, 10, 160, 160]
    written = (tmp_path / "new/rfid.csv").read_text()
    assert written == "num_tokens,num_samples,fd,mse\n1,7,1234.5,0.5\n16,7,9.87654,0.00012\n"
    figure, panels = draw_budgets(VALUES)
    drawn = {metric: dict(zip(*axes.lines[0].get_data(), strict=True)) for metric, axes in panels.items()}
    assert drawn == {metric: {k: values[metric] for k, values in VALUES.items()} for metric in ("fd", "mse")}
    assert Image.open(tmp_path / "new/rfid.png").size == tuple(figure.get_size_inches() * figure.dpi)


def test_what_is_not_a_number_is_not_written(tmp_path):
    write_json([{"value": 1.0}], tmp_path / "rfid.json")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json([{"value": float("nan")}], tmp_path / "rfid.json")
    assert json.loads((tmp_path / "rfid.json").read_text()) == [{"value": 1.0}]
    assert [file.name for file in tmp_path.iterdir()] == ["rfid.json"]
