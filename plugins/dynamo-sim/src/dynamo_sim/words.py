"""The words that the built-in model knows, and answers with."""

_TEXT = """
the of and to in is that for it as was with be by on not he his but at are this have from or had an they which one you were her all
she there would their we him been has when who will more no if out so said what up its about into than them can only other new some
could time these two may then do first any my now such like our over man me even most made after also did many before must through
back years where much your way well down should because each just those people how too little state good very make world still own
see men work long get here between both life being under never day same another know while last might us great old year off come
since against go came right used take three place few house use during without again home around small however found part once
general high upon school every away number less public almost hand point until side water something fact though put enough far took
yet head system better set told nothing night end why eyes find going look asked later knew word city face let large group young
country seem help need turn want light name question answer think form white black room open side story line second mind become
early power child between study family above book early idea war law often order field across river table stone garden morning
evening winter summer spring autumn north south east west road bridge ship train station window door floor wall roof corner street
market shop bread milk sugar salt apple orange lemon coffee paper letter page pencil music song voice sound silence color green blue
red yellow brown silver gold iron glass wood forest tree leaf flower grass seed bird horse fish cloud rain snow wind storm fire
smoke earth mountain valley island ocean beach sand star moon sun sky heaven science machine engine model number measure weight
length width height speed force energy heat signal code program computer network memory cache block token prompt request server
client worker queue batch step stream result error value type list key map index search sort merge split read write copy move
send receive start stop begin finish wait watch listen speak talk tell ask reply explain show hide reach leave return follow lead
build break repair clean wash cook eat drink sleep dream wake walk run jump climb fall fly swim ride drive carry hold drop throw
catch push pull draw paint cut join fill empty close lock free busy quick slow early late warm cold hot cool dry wet soft hard
heavy bright dark clear deep wide narrow short tall thick thin rich poor strong weak simple complex common rare clever gentle quiet
loud kind brave honest calm proud happy sad angry tired hungry ready certain possible likely true false real whole half double single
equal different similar main final total local global public private human natural modern ancient former recent present future past
always usually sometimes seldom together apart perhaps indeed rather quite nearly exactly simply quickly slowly carefully easily
"""

WORDS = tuple(dict.fromkeys(_TEXT.split()))
