"""Access to files by URL, on local disks and in object stores, by the same functions for both.

A plain path counts as a URL of the scheme `file`. Only this package uses fsspec. `client` makes the clients of stores
and retries requests, `reading` and `writing` hold the functions on files and folders, `local` writes atomically to
disks, `errors` makes sentences about failures, and `patience` limits the time of retries.
"""

from __future__ import annotations

from dist_gan.storage.client import CONNECTIONS as CONNECTIONS
from dist_gan.storage.client import asked as asked
from dist_gan.storage.client import connect as connect
from dist_gan.storage.local import sync_file as sync_file
from dist_gan.storage.local import sync_folder as sync_folder
from dist_gan.storage.local import why as why
from dist_gan.storage.local import will_read as will_read
from dist_gan.storage.patience import Patience as Patience
from dist_gan.storage.reading import exists as exists
from dist_gan.storage.reading import is_inside as is_inside
from dist_gan.storage.reading import list_names as list_names
from dist_gan.storage.reading import open_read as open_read
from dist_gan.storage.reading import read as read
from dist_gan.storage.reading import read_range as read_range
from dist_gan.storage.reading import size as size
from dist_gan.storage.reading import sizes as sizes
from dist_gan.storage.writing import make_folder as make_folder
from dist_gan.storage.writing import publish as publish
from dist_gan.storage.writing import remove as remove
from dist_gan.storage.writing import remove_folder as remove_folder
from dist_gan.urls import ALLOWED_SCHEMES as ALLOWED_SCHEMES
from dist_gan.urls import check_url as check_url
from dist_gan.urls import join as join
from dist_gan.urls import local_path as local_path
from dist_gan.wording import redact as redact
from dist_gan.wording import scheme_of as scheme_of
