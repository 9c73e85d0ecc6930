"""U-Boot's command line, on a guest's serial console."""

from __future__ import annotations

from linux_guest import LinuxGuest

PROMPT = "\n=> "
TIMES = 300.0


class Console:
    """Its command line."""

    def __init__(self, guest: LinuxGuest) -> None:
        self._guest = guest
        self._prompts = 0

    def stop_autoboot(self) -> str:
        """Keep it from booting anything; what it said up to its prompt."""
        guest = self._guest
        guest.wait_until(lambda: "stop autoboot" in guest.text, "U-Boot's countdown", TIMES)
        guest.press(b" ")
        return self.until_prompt()

    def until_prompt(self, until: str = PROMPT, seconds: float = TIMES) -> str:
        """What came up to the next prompt, or with `until` in it if that comes first."""
        self._prompts += 1
        guest = self._guest

        def said() -> list[str]:
            return guest.text.split(PROMPT)[self._prompts - 1 :]

        guest.wait_until(
            lambda: len(said()) > 1 or (said() and until in said()[0]), "U-Boot's prompt", seconds
        )
        return said()[0]

    def run(self, command: str, until: str = PROMPT, seconds: float = TIMES) -> str:
        """A command's output: see `until_prompt`."""
        self._guest.type(command)
        return self.until_prompt(until, seconds)
