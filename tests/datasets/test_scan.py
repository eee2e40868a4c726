from madad.datasets import Scan, scan_name


def test_a_name_of_a_scan():
    assert scan_name(Scan("01", {})) == "sub-01"
    assert scan_name(Scan("01", {}, session="2")) == "sub-01_ses-2"
