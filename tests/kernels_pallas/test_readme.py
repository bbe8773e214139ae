import pathlib
import re

import numpy as np

import kernels_pallas

README = (pathlib.Path(kernels_pallas.__file__).parent / "README.md").read_text()


def test_the_example_does_what_its_comments_say():
    (example,) = (code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "gather_rows(x" in code)
    scope: dict = {}
    exec(compile(example, "README.md", "exec"), scope)
    x, rows, y = (np.asarray(scope[name]) for name in ("x", "rows", "y"))
    np.testing.assert_array_equal(rows, [x[0], 0 * x[0], x[1], 0 * x[0]])
    np.testing.assert_allclose(y, [0.5 * x[0], 0.25 * x[1], 0 * x[2]], rtol=1e-6)


def test_every_op_is_in_the_tables():
    for op in kernels_pallas.OPS:
        assert f"| `{op}(" in README
        assert callable(getattr(kernels_pallas, op))
