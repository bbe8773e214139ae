from jmoe.cli.evaluate import as_text


def test_results_are_aligned_lines():
    assert as_text({"accuracy": 0.98055555555, "step": 4300, "load": [0.5, 0.5]}) == (
        "accuracy  0.980556\nstep      4300\nload      [0.5, 0.5]"
    )
    assert as_text({}) == ""
