"""`make bench`: this bus against its floors and its peers, interleaved in one process run."""
