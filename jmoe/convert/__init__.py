"""Published checkpoints in and out: names, the model that arrays imply, file formats; dense to sparse."""

from jmoe.convert.api import READ as READ
from jmoe.convert.api import WRITE as WRITE
from jmoe.convert.api import Imported as Imported
from jmoe.convert.api import load as load
from jmoe.convert.api import save as save
