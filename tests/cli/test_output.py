import argparse
import csv
from dataclasses import replace

import pytest

from madad.cli._output import network_facts, positive_seconds, table, timed, write_csv
from madad.nn import AUTOENCODER_SIZES, UNET_SIZES, AutoencoderKL, MaskedUNet


def test_a_table_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "scores.csv"
    write_csv(path, ["name", "score"], [["a,b", 1], ['say "c"', 0.5]])
    with open(path, newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["name", "score"], ["a,b", "1"], ['say "c"', "0.5"]]
    before = path.read_bytes()

    def rows():
        yield ["x", 2]
        raise KeyError("the next one")

    with pytest.raises(KeyError):
        write_csv(path, ["name", "score"], rows())
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_rows_of_a_text_table_have_one_length():
    text = table(
        {"a": {"auprc": 0.5, "dice": 1.0}, "longer": {"auprc": 0.12345, "dice": 0.0}}, ["dice", "auprc"]
    )
    empty, header, *rows = text.split("\n")
    assert empty == "" and header.split() == ["dice", "auprc"]
    assert [row.split() for row in rows] == [["a", "1.000", "0.500"], ["longer", "0.000", "0.123"]]
    assert len({len(line) for line in (header, *rows)}) == 1


@pytest.mark.parametrize(
    ("network", "sizes", "own"),
    [
        (AutoencoderKL, AUTOENCODER_SIZES, {"image_channels": 3}),
        (MaskedUNet, UNET_SIZES, {"latent_channels": 7, "dropout": 0.25}),
    ],
)
def test_a_network_is_called_by_its_size_whatever_the_data_decide(network, sizes, own):
    facts = network_facts(network(replace(sizes["tiny"], **own)))
    assert facts["network"] == network.__name__ and facts["size"] == "tiny" and facts["parameters"] > 0
    assert own.items() <= facts["config"].items()


def test_an_unknown_shape_has_no_name():
    config = replace(UNET_SIZES["tiny"], base_channels=2 * UNET_SIZES["tiny"].base_channels)
    assert network_facts(MaskedUNet(config))["size"] is None


def test_time_is_noted_by_stage(monkeypatch):
    clock = iter([5.0, 7.5])
    monkeypatch.setattr("madad.cli._output.time.monotonic", lambda: next(clock))
    seconds = {"before": 1.0}
    with timed(seconds, "fit"):
        pass
    assert seconds == {"before": 1.0, "fit": 2.5}


@pytest.mark.parametrize("text", ["0", "-1", "inf", "nan"])
def test_seconds_are_positive_and_finite(text):
    assert positive_seconds("1e3") == 1000
    with pytest.raises(argparse.ArgumentTypeError, match=f"positive number of seconds, got '{text}'"):
        positive_seconds(text)
