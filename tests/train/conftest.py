import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def datasets(tmp_path_factory):
    """Prepares datasets in a folder of this session, not in the user's."""
    before = os.environ.get("JMOE_DATA_DIR")
    os.environ["JMOE_DATA_DIR"] = os.fspath(tmp_path_factory.mktemp("datasets"))
    yield
    if before is None:
        del os.environ["JMOE_DATA_DIR"]
    else:
        os.environ["JMOE_DATA_DIR"] = before
