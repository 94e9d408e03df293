"""`python -m repa_pipeline` is `repa`."""

from repa_pipeline.cli import main

if __name__ == "__main__":
    main()
