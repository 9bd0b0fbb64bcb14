"""`python -m xkv_fx.cli`."""

from xkv_fx.cli import main

if __name__ == "__main__":
    main()
