import gc


def pytest_collection_finish():
    """Hosts collect garbage at the end of each training; look no more at the millions of objects that imports have made."""
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # some packages complain of what is still there at the end
