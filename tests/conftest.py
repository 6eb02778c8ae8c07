import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")

# A busy machine takes longer over an example than any deadline allows; `zoo.laws` says the rest.
settings.register_profile("without a deadline", deadline=None, derandomize=True, database=None)
settings.load_profile("without a deadline")
