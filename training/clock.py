"""Seconds in words. Standard library only: the launcher says them as well."""


def write_time(seconds: float) -> str:
    """Seconds as ``m:ss``, ``h:mm:ss`` or ``d days h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} days {hours}:{minutes:02}:{rest:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def write_age(seconds: float) -> str:
    """One unit: ``14 s``, ``3 min``, ``5 h``, ``2 days``."""
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{max(0.0, seconds):.0f} s"
