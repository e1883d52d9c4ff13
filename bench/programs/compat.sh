# What an i386 busybox ($1) computes: some of everything that a 32-bit program does.
set -e
mkdir -p /tmp/compat
b=/tmp/compat/busybox
cp "$1" $b
chmod 755 $b
lines() { $b seq 1 2000; }
for sum in md5sum sha1sum sha256sum sha512sum; do lines | $b $sum; done
lines | $b gzip -9 | $b gunzip | $b md5sum
lines | $b bzip2 | $b bunzip2 | $b md5sum
$b seq 1 500 | $b awk '{ s += $1 * 1.1 / 3; t += $1 % 7; n = n " " length($1) } END { printf "%.10f %d %d\n", s, t, length(n) }'
echo '123456789 987654321 * p 2 k 2 3 / p' | $b dc
$b seq 1 500 | $b sort -r | $b head -100 | $b tail -3
$b sh -c 'i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done; echo $i'
$b sh -c 'trap "echo caught" USR1; kill -USR1 $$; echo after'
$b sh -c 'kill -SEGV $$' || echo killed $?
n=0; while [ $n -lt 20 ]; do $b sh -c "exit $((n % 3))" || true; n=$((n+1)); done; echo $n processes
$b sh -c 'echo $((1 << 40)) $((-7 / 2)) $((-7 % 3))'
echo "$b" | $b sed 's/[aeiou]/<&>/g'
lines | $b tar cf - /etc/passwd 2>/dev/null | $b tar tf -
