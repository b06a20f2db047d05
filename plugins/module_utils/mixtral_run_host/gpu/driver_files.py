"""Contents of the files that the kit writes for an NVIDIA driver. Pure functions."""

from __future__ import annotations

HEAD = "# Written by mixtral-run.\n"
BLACKLIST = """// Written by mixtral-run: these change with the driver, and not by night.
Unattended-Upgrade::Package-Blacklist {{
{}}};
"""
PERSISTENCED = "/usr/bin/nvidia-persistenced --user root --persistence-mode --verbose"


def texts(params):
    """Return the settings for nouveau, unattended upgrades, the persistence daemon and NVLink 5. None: no such file.

    Args:
        params: the options unattended, persistence and board of the module nvidia_driver.
    """
    patterns = "".join('    "{}";\n'.format(each) for each in params["unattended"])
    return (
        HEAD + "blacklist nouveau\noptions nouveau modeset=0\n",
        BLACKLIST.format(patterns) if patterns else None,
        HEAD + "[Service]\nExecStart=\nExecStart=" + PERSISTENCED + "\n" if params["persistence"] else None,
        HEAD + "mlx5_ib\nib_umad\n" if params["board"] == "nvlink5" else None,
    )
