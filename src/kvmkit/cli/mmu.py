"""``kvmkit mmu``: how a guest's addresses are translated."""

import json

import click

from kvmkit.client import Machine


class Address(click.ParamType[int]):
    """0x… or decimal, of 64 bits."""

    name = "address"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number."""
        text = str(value)
        try:
            number = int(text, 16 if text[:2] in ("0x", "0X") else 10)
        except ValueError:
            self.fail(f"{text!r}: an address is 0x and hexadecimal digits, or decimal digits", param, ctx)
        if not 0 <= number < 1 << 64:
            self.fail(f"{text!r}: an address has 64 bits", param, ctx)
        return number


@click.command()
@click.argument("name")
@click.argument("gvas", metavar="GVA...", nargs=-1, required=True, type=Address())
@click.option("--vcpu", type=click.IntRange(min=0), default=0, show_default=True, help="Whose page tables.")
@click.option("--json", "as_json", is_flag=True, help="Print them as a JSON array of objects.")
def mmu(name: str, gvas: tuple[int, ...], vcpu: int, as_json: bool) -> None:
    """Follow addresses of the running guest NAME to the host's memory.

    A guest virtual address becomes a guest physical one (gva → gpa) by the guest's page tables, which are shown entry by entry;
    that is in one of the VM's memory slots, which says where in the VM process it lies (gpa → hva); and that is on a page of
    this machine's memory (hva → hpa), which only root is told.

    What an access would get is said for the supervisor and for user code: a #PF comes with its error code (1 the page is
    present, 2 a write, 4 by user code, 8 reserved bits, 0x10 an instruction fetch). The tables are those that the vCPU uses at
    this moment; it pauses while it is looked at, and no bit of the guest changes.

    \b
    Example, with the kernel's first function as the guest itself has it:
      kvmkit exec web -- grep -w _text /proc/kallsyms
      kvmkit mmu web 0xffffffff81000000
    """  # noqa: D301 - click wants the character itself
    with Machine.attach(name) as vm:
        walks = [vm.walk(gva, vcpu) for gva in gvas]
    texts = [str(walk.pop("text", "")) for walk in walks]
    if as_json:
        click.echo(json.dumps(walks, indent=2))
        return
    for text in texts:  # from a process that the guest may have taken over
        click.echo("".join(c if c == "\n" or c.isprintable() else "?" for c in text))
