def download(file): raise ValueError
