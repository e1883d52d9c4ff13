# What openssl computes of fixed keys and of /tmp/data, one line for each algorithm; the same on every machine.
set -e
cd "$(mktemp -d)"
data=/tmp/data
key=000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebf
iv=0f0e0d0c0b0a09080706050403020100
sum() { sha256sum | cut -c1-32; }
# With the code for this CPU, without AVX and later, and without any: OPENSSL_ia32cap masks CPUID.
variants() {
    for caps in "" "~0x1000000000000000:~0x0" "~0x0:~0x0"; do
        export OPENSSL_ia32cap=$caps
        [ -n "$caps" ] || unset OPENSSL_ia32cap
        "$@"
    done
}

# Known answers, from FIPS 180-4, FIPS 202, RFC 1321 and FIPS 197.
[ "$(printf abc | openssl sha256 -r | cut -c1-64)" = ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad ]
[ "$(printf abc | openssl sha1 -r | cut -c1-40)" = a9993e364706816aba3e25717850c26c9cd0d89d ]
[ "$(printf abc | openssl sha3-256 -r | cut -c1-64)" = 3a985da74fe225b2045c172d6bd390bd855f086e3e9d525b46bfe24511431532 ]
[ "$(printf abc | openssl md5 -r | cut -c1-32)" = 900150983cd24fb0d6963f7d28e17f72 ]
[ "$(printf '\000\021\042\063\104\125\146\167\210\231\252\273\314\335\356\377' | openssl enc -aes-128-ecb -nopad \
    -K 000102030405060708090a0b0c0d0e0f | od -An -tx1 | tr -d ' \n')" = 69c4e0d86a7b0430d8cdb78070b4c55a ]
echo known answers

digests() {
    for name in $(openssl list -digest-commands); do echo "digest $name $(openssl dgst "-$name" -r "$data" 2>&1 | sum)"; done
}
ciphers() {
    for name in $(openssl list -cipher-commands); do
        case $name in base64 | zlib | des-ede3-wrap) continue ;; esac
        openssl enc "-$name" -provider default -provider legacy -K $key -iv $iv -in $data -out sealed 2>/dev/null || continue
        openssl enc -d "-$name" -provider default -provider legacy -K $key -iv $iv -in sealed -out opened 2>/dev/null
        cmp opened $data
        echo "cipher $name $(sum <sealed)"
    done
}
macs() {
    for name in SHA1 SHA256 SHA512 SHA3-384 BLAKE2S-256; do echo "HMAC $name $(openssl mac -digest $name -macopt hexkey:$key -in $data HMAC | sum)"; done
    k16=$(echo $key | cut -c1-32)
    k32=$(echo $key | cut -c1-64)
    for name in AES-128-CBC CAMELLIA-128-CBC; do echo "CMAC $name $(openssl mac -cipher $name -macopt hexkey:$k16 -in $data CMAC)"; done
    echo "GMAC $(openssl mac -cipher AES-256-GCM -macopt hexkey:$k32 -macopt hexiv:${iv%????????} -in $data GMAC)"
    echo "KMAC $(openssl mac -macopt hexkey:$k32 -in $data KMAC-256)"
    echo "poly1305 $(openssl mac -macopt hexkey:$k32 -in $data Poly1305)"
    echo "siphash $(openssl mac -macopt hexkey:$k16 -in $data SipHash)"
    echo "blake2b $(openssl mac -macopt hexkey:$k32 -in $data BLAKE2BMAC)"
}
kdfs() {
    echo "HKDF $(openssl kdf -keylen 50 -kdfopt digest:SHA2-256 -kdfopt hexkey:$key -kdfopt hexsalt:$iv HKDF)"
    echo "PBKDF2 $(openssl kdf -keylen 50 -kdfopt digest:SHA512 -kdfopt pass:word -kdfopt hexsalt:$iv -kdfopt iter:2000 PBKDF2)"
    echo "scrypt $(openssl kdf -keylen 50 -kdfopt pass:word -kdfopt hexsalt:$iv -kdfopt n:1024 -kdfopt r:8 -kdfopt p:2 SCRYPT)"
}
variants digests
variants ciphers
variants macs
variants kdfs

# Curves, with fresh keys: both sides derive the same secret, and a signature is good for its key only.
for name in $(openssl ecparam -list_curves | sed -n 's/^ *\([A-Za-z0-9-]*\) *:.*/\1/p'); do
    openssl ecparam -name "$name" -genkey -noout -out one.pem 2>/dev/null || continue
    openssl ecparam -name "$name" -genkey -noout -out two.pem
    openssl ec -in one.pem -pubout -out one.pub 2>/dev/null
    openssl ec -in two.pem -pubout -out two.pub 2>/dev/null
    openssl pkeyutl -derive -inkey one.pem -peerkey two.pub -out a 2>/dev/null || { echo "curve $name can't derive"; continue; }
    openssl pkeyutl -derive -inkey two.pem -peerkey one.pub -out b
    cmp a b
    openssl dgst -sha256 -sign one.pem -out signature $data 2>/dev/null || { echo "curve $name derives"; continue; }
    openssl dgst -sha256 -verify one.pub -signature signature $data >/dev/null
    openssl dgst -sha256 -verify two.pub -signature signature $data >/dev/null 2>&1 && exit 1
    echo "curve $name derives and signs"
done

# Edwards and Montgomery curves with fixed keys in PKCS #8: public keys, and signatures, which are deterministic.
fixed() { # the structure's start in octal escapes, the key's bytes, the kind
    { printf "$1" && head -c "$2" $data; } | openssl pkey -inform DER -out fixed.pem
    openssl pkey -in fixed.pem -pubout -out fixed.pub
    echo "$3 $(sum <fixed.pub)"
    case $3 in ED*)
        head -c 1000 $data >message
        openssl pkeyutl -sign -rawin -inkey fixed.pem -in message -out signature
        openssl pkeyutl -verify -rawin -pubin -inkey fixed.pub -in message -sigfile signature >/dev/null
        echo "$3 signs $(sum <signature)" ;;
    esac
}
fixed '\060\056\002\001\000\060\005\006\003\053\145\156\004\042\004\040' 32 X25519
fixed '\060\106\002\001\000\060\005\006\003\053\145\157\004\072\004\070' 56 X448
fixed '\060\056\002\001\000\060\005\006\003\053\145\160\004\042\004\040' 32 ED25519
fixed '\060\107\002\001\000\060\005\006\003\053\145\161\004\073\004\071' 57 ED448

# RSA with a fresh key, and primes.
openssl genrsa -out rsa.pem 2048 2>/dev/null
openssl rsa -in rsa.pem -check -noout
openssl rsa -in rsa.pem -pubout -out rsa.pub 2>/dev/null
for padding in pkcs1 pss; do
    openssl dgst -sha512 -sigopt rsa_padding_mode:$padding -sign rsa.pem -out signature $data
    openssl dgst -sha512 -sigopt rsa_padding_mode:$padding -verify rsa.pub -signature signature $data
done
head -c 100 $data >message
openssl pkeyutl -encrypt -pubin -inkey rsa.pub -pkeyopt rsa_padding_mode:oaep -in message -out sealed
openssl pkeyutl -decrypt -inkey rsa.pem -pkeyopt rsa_padding_mode:oaep -in sealed | cmp - message
for prime in 2305843009213693951 170141183460469231731687303715884105727 170141183460469231731687303715884105729; do openssl prime $prime; done
